"""What processes of a pool do with an item in tests. Each imports this module, which imports nothing slow."""

from __future__ import annotations

import os
import time
from pathlib import Path


def square(number: int) -> int:
    """Square a number, the first one late; of 3 the process ends."""
    if number == 3:
        os._exit(7)
    time.sleep(0.02 if number == 0 else 0)
    return number * number


def made(folder: Path) -> bool:
    """Make a folder in one that must be there; `a` so late that others, were they begun, would not find it."""
    time.sleep(0.3 if folder.name == "a" else 0.02)
    folder.mkdir()
    return True
