"""A file that is read by ranges: large ones, kept a while, several on their way at once.

A file is cut where its tensors begin, so that no byte is fetched that another reader fetches again; a large tensor is
cut in segments, a few tiny ones that follow each other are one. What a reader has read to its end goes first when
memory is needed. Threads share the segments, and the requests.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock, local
from typing import IO, Any

from loratools.errors import BadFile

SEGMENT = 4 << 20
"""Bytes of one range at most."""

TINY = 1 << 16
"""Bytes of a tensor that has no range of its own where others like it lie beside it."""

AHEAD = 3
"""Segments of the same tensor that are on their way while one is read."""

HELD = 32
"""Segments in memory, for all files together: an eighth of a gigabyte at most; and one for each thread."""

IN_FLIGHT = 16
"""Requests at once."""

Fetch = Callable[[int, int], memoryview]
"""Returns the bytes [start, stop) of an object."""


class _Cache:
    """Segments by file and number: being fetched, or held; those that were read to their end go first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._held: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._spent: OrderedDict[tuple[int, int], None] = OrderedDict()

    def ask(self, file: Ranges, number: int) -> Future[memoryview]:
        """Return a segment that is on its way, or here."""
        with self._lock:
            return self._ask(file, number)

    def foresee(self, file: Ranges, numbers: range) -> None:
        """Ask for segments that are read soon, as far as nothing that is still to be read has to go for them."""
        with self._lock:
            for number in numbers:
                if len(self._held) < HELD or self._spent or (id(file), number) in self._held:
                    self._ask(file, number)

    def _ask(self, file: Ranges, number: int) -> Future[memoryview]:
        key = id(file), number
        if (found := self._held.get(key)) is not None:
            self._held.move_to_end(key)
            return found
        if self._pool is None:
            self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="ranges")
        asked = self._pool.submit(file.fetch, number)
        self._held[key] = asked
        while len(self._held) > HELD:
            oldest = self._spent.popitem(last=False)[0] if self._spent else next(iter(self._held))
            if gone := self._held.pop(oldest, None):
                gone.cancel()
        return asked

    def spend(self, file: Ranges, number: int) -> None:
        """Take down that a segment was read to its end."""
        with self._lock:
            if (key := (id(file), number)) in self._held:
                self._spent[key] = None
                self._spent.move_to_end(key)

    def drop(self, file: Ranges, number: int | None = None) -> None:
        """Let go of a segment that could not be fetched, or of all of a file."""
        with self._lock:
            for key in [key for key in self._held if key[0] == id(file) and number in (None, key[1])]:
                self._held.pop(key).cancel()
                self._spent.pop(key, None)


_CACHE = _Cache()
_MINE = local()


class Ranges:
    """The bytes of an object behind a local file that has its size, and its first `here` bytes.

    `cuts` are the beginnings of what is read together, such as tensors; `fetch` gets bytes of the object.
    """

    def __init__(self, path: Path, size: int, here: int, cuts: Iterable[int], fetch: Fetch, told: str) -> None:
        self.path, self.size, self.here, self.told = path, size, here, told
        self._fetch = fetch
        self._bounds, self._last = _segments(sorted({here, *(cut for cut in cuts if here < cut < size)}), size)

    def fetch(self, number: int) -> memoryview:
        """Fetch a segment."""
        return self._fetch(self._bounds[number], self._bounds[number + 1])

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from `offset` on; raise `BadFile` at the end of the file, `StoreError` where a store fails."""
        done = 0
        if offset + len(buffer) > self.size:
            raise BadFile(f"{self.path}: ends at byte {self.size}, and was to be read to {offset + len(buffer)}")
        if offset < self.here:
            with self.path.open("rb") as file:
                file.seek(offset)
                done = file.readinto(buffer[: self.here - offset])
        while done < len(buffer):
            at = offset + done
            number = self._number(at)
            begin, end = self._bounds[number], self._bounds[number + 1]
            count = min(end - at, len(buffer) - done)
            buffer[done : done + count] = self._segment(number)[at - begin : at - begin + count]
            done += count
            if at + count == end:
                _CACHE.spend(self, number)

    def _segment(self, number: int) -> memoryview:
        """Wait for a segment; the last that a thread had is its own, whatever had to go meanwhile."""
        if getattr(_MINE, "key", None) == (id(self), number):
            mine: memoryview = _MINE.data
            return mine
        asked = _CACHE.ask(self, number)
        _CACHE.foresee(self, range(number + 1, min(number + AHEAD, self._last[number]) + 1))
        while True:
            try:
                _MINE.key, _MINE.data = (id(self), number), asked.result()
                return asked.result()
            except CancelledError:
                asked = _CACHE.ask(self, number)
            except BaseException:
                _CACHE.drop(self, number)
                raise

    def ahead(self, start: int, stop: int) -> None:
        """Ask for the first segments of bytes that are read next, in order."""
        if (start := max(start, self.here)) < stop:
            first = self._number(start)
            _CACHE.foresee(self, range(first, min(first + AHEAD, self._number(stop - 1)) + 1))

    def open(self) -> IO[bytes]:
        """Return it as a file that is open for reading; `fileno` is that of the local file."""
        return io.BufferedReader(_File(self), 1 << 16)

    def close(self) -> None:
        """Let go of all segments."""
        _CACHE.drop(self)
        _MINE.key = None

    def _number(self, at: int) -> int:
        return bisect_right(self._bounds, at) - 1


class _File(io.RawIOBase):
    """A `Ranges` as Python's files are."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges, self._at = ranges, 0
        self._here = ranges.path.open("rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._here.fileno()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + (0, self._at, self._ranges.size)[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._ranges.size - self._at)]
        if self._at < self._ranges.here:  # a buffer that is filled ahead fetches nothing
            view = view[: self._ranges.here - self._at]
        if len(view):
            self._ranges.read_into(view, self._at)
        self._at += len(view)
        return len(view)

    def close(self) -> None:
        self._here.close()
        super().close()


def _segments(cuts: list[int], size: int) -> tuple[list[int], list[int]]:
    """Return where segments begin, the end of the file last, and for each the number of the last that is read with it.

    Beginnings of tiny pieces that follow each other are left out, as long as what they are part of is no larger than
    a segment.
    """
    bounds, last = cuts[:1], []
    for start, stop in _pieces(cuts, size):
        inner = [*range(start + SEGMENT, stop, SEGMENT), stop]
        bounds += inner
        last += [len(bounds) - 2] * len(inner)
    return bounds, last


def _pieces(cuts: list[int], size: int) -> Iterator[tuple[int, int]]:
    open_at: int | None = None
    for start, stop in zip(cuts, [*cuts[1:], size], strict=True):
        if start == stop:
            continue
        tiny = stop - start < TINY
        if open_at is not None and (not tiny or stop - open_at > SEGMENT):
            yield open_at, start
            open_at = None
        if not tiny:
            yield start, stop
        elif open_at is None:
            open_at = start
    if open_at is not None:
        yield open_at, size
