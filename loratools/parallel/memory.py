"""Memory that files are read into and written from, at places in a page where the kernel copies fast.

Processors such as AMD's Zen 3 copy at a quarter of their speed to a place that lies 1 to 31 bytes further in its page
than what is copied. Large memory of Python begins 16 bytes into a page, and a tensor in its file at any multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

PAGE = 4096
"""Bytes after which the places that are slow come again."""

_BEHIND = 32
_PLACES = (0, 64, 128)  # whole lines of the cache, of which a read and a write rule out one each

_KEPT = 4 << 20  # bytes

_MINE = local()


def place(read: int | None = None, write: int | None = None) -> int:
    """Return how far into a page memory begins that is fast to fill from, or to write to, some place in a file.

    Args:
        read: Offset in a file, in bytes, from which the memory is filled. Default: it is not filled from a file.
        write: Offset in a file, in bytes, to which it is written. Default: it is not written to a file.

    Example:
        >>> place(read=8), place(read=4088), place(write=16)
        (0, 64, 64)
    """
    return next(
        at
        for at in _PLACES
        if not (read is not None and _is_slow(read, at)) and not (write is not None and _is_slow(at, write))
    )


def _is_slow(source: int, target: int) -> bool:
    return 0 < (target - source) % PAGE < _BEHIND


class Room:
    """Memory that is used again: fresh pages cost as much as reading into them."""

    def __init__(self) -> None:
        self._held = memoryview(b"")

    def of(self, nbytes: int, read: int | None = None, write: int | None = None) -> memoryview:
        """Return so many bytes, at the `place` for a read or a write; what they held is lost."""
        if len(self._held) < nbytes + _PLACES[-1]:
            from mmap import mmap  # whose memory begins with a page

            self._held = memoryview(mmap(-1, nbytes + _PLACES[-1]))
        first = place(read, write)
        return self._held[first : first + nbytes]

    def __len__(self) -> int:
        """Return the bytes that it holds."""
        return len(self._held)


@contextmanager
def lent() -> Iterator[Room]:
    """Lend memory of this thread while the block runs, to one at a time; what has grown large is not kept."""
    free: list[Room] = _MINE.__dict__.setdefault("free", [])
    room = free.pop() if free else Room()
    try:
        yield room
    finally:
        if len(room) <= _KEPT:
            free.append(room)
