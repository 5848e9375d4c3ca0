"""Make the real models of the tests, once: `python -m tests.make`. A second run finds them and does nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.make import REPOSITORY, real_models_folder


def main() -> None:
    folder = real_models_folder()
    if not folder.is_dir():
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
