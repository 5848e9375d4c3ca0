"""A file inside a file, seen as a file of its own: a member of a tar archive, read where it lies."""

from __future__ import annotations

import io
import os
import sys
from typing import IO, Any


class Window(io.RawIOBase):
    """Bytes [`start`, `stop`) of an open file, for reading; the file's own position moves with it.

    A read of more than `longest` bytes raises `ValueError`.
    """

    def __init__(self, file: IO[bytes], start: int, stop: int, longest: int = sys.maxsize) -> None:
        super().__init__()
        self._file, self._start, self._stop, self._longest = file, start, stop, longest
        self._at = start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        if origin + offset < self._start:
            raise ValueError(f"position {origin + offset - self._start} lies before the first byte")
        self._at = origin + offset
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        if size > self._longest:  # before Python sets aside as much
            raise ValueError(f"a directory of {size} bytes; at most {self._longest} are read")
        return super().read(size) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        data = self._file.read(max(0, min(len(view), self._stop - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
