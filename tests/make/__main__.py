"""Make the real models of the tests, once: `python -m tests.make`. A second run finds them and does nothing."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.make import REPOSITORY, real_models_folder


def main() -> None:
    folder = real_models_folder()
    if not folder.is_dir():
        # Importing the libraries alone leaves files in the temporary folder (torch does), so they get one of their own.
        with tempfile.TemporaryDirectory(prefix=f"loratools-tests-{os.getpid()}-") as temporary:
            os.environ["TMPDIR"] = tempfile.tempdir = temporary
            from tests.make import real_models

            real_models.make_all(folder)
    if folder.parent == REPOSITORY / ".real-models":
        remove_older(folder)
    print(f"the real models are in {folder}")


def remove_older(folder: Path) -> None:
    """Delete what an earlier version of the script made: over a gigabyte each."""
    for other in folder.parent.iterdir():
        if other != folder and other.is_dir():
            shutil.rmtree(other)


if __name__ == "__main__":
    sys.exit(main())
