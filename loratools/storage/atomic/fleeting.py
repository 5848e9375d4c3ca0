"""Folders for files that go away with the run, where the system has such; those of killed runs go with the next."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from loratools.options import words
from loratools.storage.atomic import leftovers, locks, machine
from loratools.storage.atomic.undisturbed import undisturbed

Use = Literal["headers", "demo", "merge", "adapter"]
"""What a temporary folder is for; part of its name."""

_NAME = rf"loratools-({'|'.join(words(Use))})-[a-z0-9_]{{8}}([0-9a-f]{{4}})?"


@contextmanager
def temporary(use: Use) -> Iterator[Path]:
    """Yield a new folder `loratools-USE-XXXXXXXXMMMM` for temporary files (TMPDIR), which goes away with the block.

    Those that this user's killed runs left there are removed first: a merge that kept nothing here may have left
    several gigabytes.
    """
    from tempfile import gettempdir

    _sweep(Path(gettempdir()))
    folder, lock = _make(use)
    try:
        yield folder
    finally:
        with undisturbed():
            leftovers.remove(folder)
            if lock:
                lock.release()


def _make(use: Use) -> tuple[Path, locks.Lock | None]:
    from tempfile import mkdtemp

    while True:
        folder = Path(mkdtemp(prefix=f"loratools-{use}-", suffix=machine.mark()))
        try:
            return folder, locks.lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run took it for a leftover before it was locked
        except OSError:  # nothing can be locked here, so nothing is ever swept either
            return folder, None


def _sweep(place: Path) -> None:
    for path in place.iterdir():
        if re.fullmatch(_NAME, path.name):
            try:
                if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():  # Windows gives each user a folder
                    continue
                lock = locks.lock(path)
            except OSError:  # a living run's, or gone, or no folder, or nothing can be locked here
                continue
            if not machine.perhaps_elsewhere(path):
                leftovers.remove(path)
            lock.release()
