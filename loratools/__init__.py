"""The toolkit for LoRA adapter files: an exact, versioned format, and surgery on models with it.

The public names load on first use (PEP 562): `import loratools` imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from loratools.storage import sources

__version__ = "0.1.0"

sources.install("hf://", "loratools.hub.local", "resolve")

# public name -> the module that defines it
_HOME: dict[str, str] = {
    "Adapter": "loratools.adapter.model",
    "BaseIdentity": "loratools.adapter.model",
    "Checkpoint": "loratools.storage.checkpoint",
    "LoraToolsError": "loratools.errors",
    "certify": "loratools.surgery.extract.certify",
    "combine": "loratools.surgery.combine",
    "compare": "loratools.surgery.compare",
    "convert": "loratools.surgery.convert",
    "extract": "loratools.surgery.extract",
    "hash_checkpoint": "loratools.surgery.hash",
    "inspect": "loratools.surgery.inspect",
    "merge": "loratools.surgery.merge",
    "open_adapter": "loratools.dialects",
    "resize": "loratools.surgery.resize",
    "save_adapter": "loratools.dialects",
    "spectrum": "loratools.surgery.spectrum",
    "validate": "loratools.surgery.validate",
    "verify": "loratools.surgery.verify",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'loratools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
