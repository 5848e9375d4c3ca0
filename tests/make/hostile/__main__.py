"""Make every hostile file: `python -m tests.make.hostile FOLDER [NAME ...]`, one folder each."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.make.hostile import cases

if __name__ == "__main__":
    for name in sys.argv[2:] or cases():
        folder = Path(sys.argv[1], name)
        folder.mkdir(parents=True)
        cases()[name].make(folder)
        print(f"{name}: loratools {cases()[name].command}")
