"""Carry out a plan of changes that lies written down in a folder; a plan that was cut short is carried out again.

    plan.json    {"steps": [...]}, each {"put": name here, "over": name beside this folder},
                 or {"header": name here, "of": name beside this folder, "size": n, "grow": k, "inode": i}

A step that is done already is known by what it left, so that a plan can be carried out twice. Standard library only, so
that the file can also be run by itself: `python -I apply.py FOLDER` works on where its caller was killed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

PLAN = "plan.json"
BLOCK = 4096
"""Bytes: what can be inserted at the beginning of a file is a multiple of the blocks that file systems work with."""

_INSERT_RANGE = 0x20
_CANNOT = 3  # exit code: the file system inserts nothing; nothing has happened


class CannotInsert(OSError):
    """The file system cannot put room into the beginning of a file; the file is what it was."""


def apply(folder: Path) -> None:
    """Carry out the plan in a folder, on the files beside that folder.

    Raises `CannotInsert` where a header needs room that the file system cannot make, before anything has happened, and
    `OSError` where a step fails, or a file is another than the one that was planned for.
    """
    steps = json.loads((folder / PLAN).read_text(encoding="utf-8"))["steps"]
    for step in steps:
        if "header" in step:
            _overwrite(folder, step)
    for step in steps:
        if "put" in step and os.path.lexists(source := folder / step["put"]):
            os.replace(source, folder.parent / step["over"])  # noqa: PTH105


def _overwrite(folder: Path, step: dict[str, Any]) -> None:
    """Write a header over the old one, in a file that grows at its beginning where the new one is longer."""
    header, path = (folder / step["header"]).read_bytes(), folder.parent / step["of"]
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status, grown = os.fstat(descriptor), step["size"] + step["grow"]
        if status.st_ino != step["inode"] or status.st_size not in (step["size"], grown):
            raise OSError(errno.ESTALE, "another file than the one that was to be edited", str(path))
        if status.st_size != grown:
            _insert(descriptor, step["grow"])
        done = 0
        while done < len(header):
            done += os.pwritev(descriptor, [memoryview(header)[done:]], done, os.RWF_DSYNC)
    finally:
        os.close(descriptor)


def _insert(descriptor: int, count: int) -> None:
    """Put `count` bytes before the first of a file, by its list of blocks; no data are copied."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, _INSERT_RANGE, 0, count):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise CannotInsert(number, os.strerror(number))


if __name__ == "__main__":
    try:
        apply(Path(sys.argv[1]))
    except (CannotInsert, AttributeError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(_CANNOT)
