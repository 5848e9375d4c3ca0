"""Write a safetensors file of lazy tensors, byte for byte the same every time; a file that tensors are added to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

from loratools.storage import atomic, dtypes, files
from loratools.storage.beside import making
from loratools.storage.header import TensorSpec, encode_header
from loratools.storage.lazy import LazyTensor, chunks_of_all


def ordered(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Sort tensors as they lie in a file: wide dtypes first, so that all stay aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-dtypes.bits(item[1].dtype), item[0])))


def header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file of these tensors, `ordered`, length prefix included."""
    entries = ((name, lazy.dtype, lazy.shape, lazy.nbytes) for name, lazy in ordered(tensors).items())
    return encode_header(entries, metadata)


def pieces(tensors: Mapping[str, LazyTensor]) -> Iterator[memoryview]:
    """Yield the data that follow the `header`, each piece valid until the next is asked for."""
    for _, pieces_of_one in chunks_of_all(ordered(tensors)):
        yield from pieces_of_one


def write(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, which says how it was made where that is known; those in files need no torch."""
    with path.open("wb") as output:
        output.write(header(tensors, {**metadata, **making.entry()}))
        output.writelines(pieces(tensors))


def save(
    target: Path, name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], *, force: bool,
    beside: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write `target`, a single file, or a folder that holds it as `name` and the texts `beside` it; atomically."""
    with atomic.new_output(target, name, force=force) as path:
        write(path, tensors, metadata)
        if target.suffix != path.suffix:
            for other, text in (beside or {}).items():
                path.with_name(other).write_text(text, encoding="utf-8", newline="\n")


class Appended:
    """Pieces written one after the other at an offset of a descriptor; small ones are gathered and written together."""

    def __init__(self, target: int, offset: int) -> None:
        self._target = target
        self._gathered = bytearray()
        self.end = offset

    def write(self, piece: memoryview) -> None:
        """Write a piece, or take a copy of it."""
        if len(self._gathered) + len(piece) > files.CHUNK:
            self.flush()
        if len(piece) < files.CHUNK:
            self._gathered += piece
        else:
            files.write_from(self._target, piece, self.end)
        self.end += len(piece)

    def flush(self) -> None:
        """Write what was gathered."""
        files.write_from(self._target, memoryview(self._gathered), self.end - len(self._gathered))
        self._gathered = bytearray()


class Spool:
    """A file that threads append tensors to: memory stays that of a few, however many there will be."""

    def __init__(self, path: Path) -> None:
        """Make the file, which must not exist."""
        self.path = path
        self._end = 0
        self._lock = Lock()
        path.touch(exist_ok=False)

    def append(self, dtype: str, shape: tuple[int, ...], raw: memoryview) -> TensorSpec:
        """Write the bytes of a tensor, as a safetensors file has them; return where they lie."""
        with self._lock:
            start, self._end = self._end, self._end + len(raw)
        with files.descriptor(self.path, os.O_WRONLY) as target:
            files.write_from(target, raw, start)
        return TensorSpec(dtype, shape, self.path, start, start + len(raw))

    def stored(self, tensor: LazyTensor) -> LazyTensor:
        """Write a tensor; return one that stands for what was written."""
        raw = b"".join(map(bytes, tensor.chunks("it")))  # each piece is overwritten by the next
        return LazyTensor.stored(self.append(tensor.dtype, tensor.shape, memoryview(raw)))
