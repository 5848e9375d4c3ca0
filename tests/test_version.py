"""One version: of the installed package, of the library, and in the file that the build reads."""

from __future__ import annotations

from importlib.metadata import version

import loratools
from loratools.version import __version__


def test_the_package_the_library_and_the_file_have_one_version() -> None:
    assert loratools.__version__ == __version__ == version("loratools")
