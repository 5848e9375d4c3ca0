"""The hidden folders beside an output: making one that is ours alone."""

from __future__ import annotations

import errno
import time
from pathlib import Path

from loratools.errors import OutputRefused
from loratools.storage.atomic import locks

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the errors that say that a disk is full."""


def beside(target: Path, name: str) -> Path:
    """Return the path of the hidden folder of that name beside an output."""
    return target.parent / f".{target.name}.{name}"


def make(folder: Path, target: Path, *, kept: bool, shared: bool = False) -> locks.Lock | None:
    """Make a folder, or take the kept one that is there; return its lock, or None where the file system has none.

    A `shared` lock is one beside others that are shared.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            return locks.share(folder) if shared else locks.lock(folder)
        except BlockingIOError:
            if kept:
                hint = "Wait for it, or choose another output."
                raise Busy(f"{target} is being written by another process", hint=hint) from None
            time.sleep(0.001)  # a sweep took it for a leftover before it was locked, and is about to delete it
        except FileNotFoundError:  # that is done
            continue
        except OSError:  # nothing can be locked here, so nothing is ever swept either
            return None


class Busy(OutputRefused):
    """Another process holds the scratch folder: it is not ours to remove."""
