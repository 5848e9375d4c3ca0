"""The version of the package; the format has one of its own (`format/manifest.py`)."""

__version__ = "0.1.0"
