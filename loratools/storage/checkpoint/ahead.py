"""Digests of two models taken ahead, by a thread of its own, while what computes on them is still being imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread

from loratools.errors import LoraToolsError
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec

PIECE = 1 << 23
"""Bytes of one read: an import holds the interpreter for milliseconds, and after each piece the thread waits for it."""

_FOUND: ContextVar[Mapping[TensorSpec, str] | None] = ContextVar("found", default=None)


class Ahead:
    """A thread that hashes tensors which two models have under one name, in one dtype and shape, the largest first."""

    def __init__(self, first: Checkpoint, second: Checkpoint) -> None:
        self.digests: dict[TensorSpec, str] = {}
        both = [(first.specs[name], spec) for name, spec in second.specs.items() if name in first.specs]
        self._pairs = sorted((pair for pair in both if _alike(*pair)), key=lambda pair: -pair[0].nbytes)
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="digests ahead")
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the piece that it is at; of a tensor that was not finished there is nothing."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        for pair in self._pairs:
            try:
                found = self._both(*pair)
            except (LoraToolsError, OSError):
                return  # whoever computes on it reads it too, and says what is wrong
            if found is None:
                return
            self.digests.update(zip(pair, found, strict=True))

    def _both(self, first: TensorSpec, second: TensorSpec) -> tuple[str, str] | None:
        """Return both digests, hashing once while both have the same bytes; None where it was stopped."""
        one = other = digest.start_tensor(first.dtype, first.shape)
        size = min(PIECE, first.nbytes)
        ours, theirs = bytearray(size), bytearray(size)  # these are compared in place, views of them number by number
        with files.opened(first) as read, files.opened(second) as read_other:
            for offset in range(0, first.nbytes, size or 1):
                if self._stopped.is_set():
                    return None
                if first.nbytes - offset < size:
                    ours, theirs = bytearray(first.nbytes - offset), bytearray(first.nbytes - offset)
                read(memoryview(ours), offset)
                read_other(memoryview(theirs), offset)
                if other is one and ours != theirs:
                    other = one.copy()
                one.update(ours)
                if other is not one:
                    other.update(theirs)
        return digest.finish(one), digest.finish(other)


@contextmanager
def hashing(first: Checkpoint, second: Checkpoint) -> Iterator[Ahead]:
    """Hash tensors of two models until it is told to stop; while the block runs `found` knows what was finished."""
    ahead = Ahead(first, second)
    token = _FOUND.set(ahead.digests)
    try:
        yield ahead
    finally:
        _FOUND.reset(token)
        ahead.stop()


def found() -> Mapping[TensorSpec, str]:
    """Return the digests that were taken ahead by the block of `hashing` that runs; {} where there is none."""
    return _FOUND.get() or {}


def _alike(first: TensorSpec, second: TensorSpec) -> bool:
    plain = first.encoding is None and second.encoding is None
    return plain and (first.dtype, first.shape) == (second.dtype, second.shape)
