"""Reads and writes at an offset, and copies inside the kernel: the few system calls under every tile.

system   what systems differ in
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import BadFile
from loratools.parallel.memory import Room, lent
from loratools.storage import dtypes
from loratools.storage.atomic import system
from loratools.storage.header import TensorSpec
from loratools.storage.resolvers import FAR

if TYPE_CHECKING:
    import torch

    from loratools.storage.resolvers import Far

# Of copies in the kernel: another file system, or a kernel without the call.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}

_READS: dict[int, Far] = {}
"""Descriptor -> what reads the file, where its bytes lie elsewhere."""

CHUNK = 1 << 20
"""Bytes of one read: small enough to stay in a core's cache between reading, arithmetic and writing."""


@contextmanager
def descriptor(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file by its descriptor for `read_into` and friends; raise `BadFile` where it cannot be opened.

    That of a file which lies elsewhere (`resolvers.FAR`) cannot be read by any other call, which would find zeros.
    """
    far = FAR.get(str(path)) if FAR and flags == os.O_RDONLY else None
    try:
        number = os.open(path, (os.O_WRONLY if far else flags) | system.BINARY, 0o666)
    except OSError as error:
        if flags != os.O_RDONLY:
            raise
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    if far:
        _READS[number] = far
    try:
        yield number
    finally:
        if far:
            del _READS[number]
        os.close(number)


@contextmanager
def temporary(folder: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    """Make a file that goes away with the block: its descriptor, and its path, by which it may be opened meanwhile."""
    from tempfile import mkstemp

    number, name = mkstemp(dir=folder, prefix=prefix)
    try:
        yield number, Path(name)
    finally:
        os.close(number)
        Path(name).unlink()


def read_into(source: int, buffer: memoryview, offset: int, path: Path | str = "a file") -> None:
    """Fill `buffer` from a descriptor at `offset`; raise `BadFile`, which names `path`, at the end of the file."""
    if far := _READS.get(source):
        far.read_into(buffer, offset)
        return
    done = 0
    while done < len(buffer):
        count = system.read_at(source, buffer[done:], offset + done)
        if count == 0:
            raise shortened(path, offset + done)
        done += count


def shortened(path: Path | str, end: int) -> BadFile:
    """Return the exception for a file that ended while it was read."""
    return BadFile(f"{path}: became shorter while it was read (ends at byte {end})")


def write_from(target: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` to a descriptor at `offset`."""
    done = 0
    while done < len(buffer):
        done += system.write_at(target, buffer[done:], offset + done)


def copy_range(source: int, start: int, stop: int, target: int, offset: int, path: Path | str = "a file") -> None:
    """Copy bytes [`start`, `stop`) of one descriptor to another at `offset`, inside the kernel where it does that well.

    Raises `BadFile`, which names `path`, where the source ends too early.
    """
    far = _READS.get(source)
    if far:
        far.ahead(start, stop)
    kernel = not far and system.copies_well(target, start, offset)
    while kernel and start < stop:
        try:
            count = os.copy_file_range(source, target, min(stop - start, 1 << 26), start, offset)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if count == 0:
            raise BadFile(f"{path}: became shorter while it was copied (ends at byte {start})")
        start += count
        offset += count
    with lent() as room:
        for begin in range(start, stop, CHUNK):
            to = offset + begin - start
            buffer = room.of(min(stop - begin, CHUNK), begin, to)
            read_into(source, buffer, begin, path)
            write_from(target, buffer, to)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to another, which is made or emptied; raise `BadFile` where the first cannot be read."""
    with descriptor(source) as read, descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as written:
        copy_range(read, 0, source.stat().st_size, written, 0, source)


Read = Callable[[memoryview, int], None]
"""Fills a buffer with the bytes of a tensor from an offset on, counted from the tensor's own beginning."""


@contextmanager
def opened(spec: TensorSpec) -> Iterator[Read]:
    """Open a tensor for reading piece by piece; a weight that is stored as codes reads as the float32 it stands for.

    Raises `BadFile` where its file cannot be opened, and the function that it yields where the file ends too early.
    """
    if spec.encoding is not None:
        with spec.encoding.reader() as read:
            yield read
        return
    with descriptor(spec.file) as source:
        yield lambda buffer, offset: read_into(source, buffer, spec.start + offset, spec.file)


def chunks(spec: TensorSpec, size: int = CHUNK) -> Iterator[memoryview]:
    """Yield the bytes of a tensor piece by piece, each valid until the next is asked for."""
    with opened(spec) as read, lent() as room:
        for offset in range(0, spec.nbytes, size):
            piece = room.of(min(size, spec.nbytes - offset), spec.start + offset)
            read(piece, offset)
            yield piece


def chunks_of_all(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Yield each tensor's name and `chunks` of it; a file is opened once for tensors that follow each other in it.

    Small ones that lie side by side are read at once.
    """
    with ExitStack() as stack, lent() as room:
        file: Path | None = None
        source = -1
        for run in _runs(specs, CHUNK):
            first, last = run[0][1], run[-1][1]
            if first.encoding is not None:
                yield run[0][0], chunks(first)
                continue
            if first.file != file:
                stack.close()
                source, file = stack.enter_context(descriptor(first.file)), first.file
            if len(run) == 1:
                yield run[0][0], _pieces(source, first, room)
                continue
            begin = first.start
            buffer = room.of(last.stop - begin, begin)
            read_into(source, buffer, begin, first.file)
            for name, spec in run:
                yield name, iter((buffer[spec.start - begin : spec.stop - begin],))


def _runs(specs: Mapping[str, TensorSpec], size: int) -> Iterator[list[tuple[str, TensorSpec]]]:
    """Yield the tensors in their order, those together that lie side by side in at most `size` bytes of a file."""
    run: list[tuple[str, TensorSpec]] = []
    for item in specs.items():
        spec = item[1]
        if run:
            first, last = run[0][1], run[-1][1]
            beside = spec.encoding is None and first.encoding is None and spec.start == last.stop
            other = spec.file is not first.file and spec.file != first.file
            if not beside or other or spec.stop - first.start > size:
                yield run
                run = []
        run.append(item)
    if run:
        yield run


def _pieces(source: int, spec: TensorSpec, room: Room) -> Iterator[memoryview]:
    for start in range(spec.start, spec.stop, CHUNK):
        piece = room.of(min(CHUNK, spec.stop - start), start)
        read_into(source, piece, start, spec.file)
        yield piece


def same_bytes(first: TensorSpec, second: TensorSpec) -> bool:
    """Tell whether two tensors have one dtype, one shape, and the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    length = min(CHUNK, first.nbytes)
    ours, theirs = bytearray(length), bytearray(length)  # two of these are compared where they lie, views are copied
    with opened(first) as read_first, opened(second) as read_second:
        for offset in range(0, first.nbytes, length or 1):
            if first.nbytes - offset < length:
                length = first.nbytes - offset
                ours, theirs = ours[:length], theirs[:length]
            read_first(memoryview(ours), offset)
            read_second(memoryview(theirs), offset)
            if ours != theirs:
                return False
    return True


def row_pieces(specs: Sequence[TensorSpec], columns: int, nbytes: int) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Read tensors of as many elements side by side, each as a matrix of `columns` columns, some rows at a time.

    Yields the number of the first row, how many there are, and for each tensor the bytes of the rows, valid until the
    next ones are asked for. A tile of the widest dtype takes about `nbytes`, at least one row.
    """
    widths = [columns * dtypes.bits(spec.dtype) // 8 for spec in specs]
    total = specs[0].parameters // columns
    step = max(1, nbytes // max(widths))
    with ExitStack() as stack:
        ways = [(stack.enter_context(opened(spec)), stack.enter_context(lent()), spec.start) for spec in specs]
        for first in range(0, total, step):
            count = min(first + step, total) - first
            pieces = []
            for (read, room, start), width in zip(ways, widths, strict=True):
                pieces.append(piece := room.of(count * width, start + first * width))
                read(piece, first * width)
            yield first, count, pieces


def row_tiles(
    specs: Sequence[TensorSpec], columns: int, nbytes: int
) -> Iterator[tuple[int, list[memoryview], list[torch.Tensor]]]:
    """Read tensors as `row_pieces` does; yield the number of the first row, the bytes, and the rows themselves.

    These are (k, columns) in the stored dtype, and share the memory of the bytes.
    """
    import torch

    twins = [dtypes.to_torch(spec.dtype) for spec in specs]
    for first, _, pieces in row_pieces(specs, columns, nbytes):
        rows = [
            torch.frombuffer(piece, dtype=twin).view(-1, columns) for piece, twin in zip(pieces, twins, strict=True)
        ]
        yield first, pieces, rows


def read_bytes(spec: TensorSpec) -> bytearray:
    """Return the raw bytes of a tensor."""
    data = bytearray(spec.nbytes)
    with opened(spec) as read:
        read(memoryview(data), 0)
    return data


def read_tensor(spec: TensorSpec) -> torch.Tensor:
    """Return a tensor from its file, in its stored dtype and shape.

    Raises `UnsupportedAdapter` for a dtype that torch cannot hold.
    """
    import torch

    dtype = dtypes.to_torch(spec.dtype)
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(read_bytes(spec), dtype=dtype).view(spec.shape)
