"""Inputs are what they were: a file that a task opens is remembered, and looked at again before the output appears."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loratools.errors import BadFile, counted

Stamp = tuple[int, int, int, int]
"""What a file is when it is opened: device, inode, bytes, and the time of its last change in nanoseconds."""

_FIELDS = ("device", "inode", "size", "time of change")
_SEEN: ContextVar[dict[Path, Stamp] | None] = ContextVar("seen", default=None)


@contextmanager
def watched() -> Iterator[None]:
    """Remember the inputs that are opened while the block runs; within another such block, that one goes on."""
    if _SEEN.get() is not None:
        yield
        return
    token = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(token)


@contextmanager
def afresh() -> Iterator[None]:
    """Begin anew while the block runs: what it opens is no input of the task around it, which may replace it."""
    token = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(token)


def see(path: Path, status: os.stat_result | None = None) -> None:
    """Remember what an input is (default: what it is now); the first time counts."""
    seen = _SEEN.get()
    if seen is not None and (key := path.absolute()) not in seen:
        seen[key] = stamp(status or path.stat())


def seen() -> dict[Path, Stamp]:
    """Return the inputs that this task has opened, as each was when it was."""
    return dict(_SEEN.get() or {})


def is_still(path: Path, was: Stamp) -> bool:
    """Tell whether a file is there, and what it was."""
    try:
        return stamp(path.stat()) == was
    except OSError:
        return False


def forget(path: Path) -> None:
    """Let go of an input that the task itself has changed."""
    if (seen := _SEEN.get()) is not None:
        seen.pop(path.absolute(), None)


def check_unchanged(scratch: Path | None = None) -> None:
    """Raise `BadFile` with every input that is another than when it was opened; files in `scratch` are our own.

    A file that changes while it is read is neither the old one nor the new, and nor is what was made of it.
    """
    seen, changed = _SEEN.get() or {}, []
    for path, before in list(seen.items()):
        if scratch and path.is_relative_to(scratch.absolute()):
            del seen[path]
            continue
        try:
            now = stamp(path.stat())
        except OSError as error:
            changed.append(f"{path}: {(error.strerror or str(error)).lower()}")
            continue
        if other := [f"{what} {a}, now {b}" for what, a, b in zip(_FIELDS, before, now, strict=True) if a != b]:
            changed.append(f"{path}: {', '.join(other)}")
    if changed:
        raise BadFile(
            f"{counted(len(changed), 'input')} changed while they were read; nothing was made of them",
            changed,
            hint="Run it again when nothing else writes them.",
        )


def stamp(status: os.stat_result) -> Stamp:
    """Return what tells one state of a file from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
