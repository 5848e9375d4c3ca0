"""The safetensors header: parse, check, and write it canonically. Standard library only.

A file is `u64 little-endian N`, N bytes of JSON, then the data. The rules enforced here are those of the
safetensors library (contiguous offsets, no holes, no overlap, no trailing bytes, shape × dtype = length) and
those that it lets pass although its format text forbids them: duplicate names, unknown fields in an entry,
a header that does not begin with `{`.
"""

from __future__ import annotations

import json
import os
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.atomic.inputs import Stamp, see, stamp
from loratools.storage.sources import open_file, refuse_pointer, remember, remembered, stamps
from loratools.storage.strict_json import parse_json_object

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

MAX_TENSORS = 500_000
"""Tensors of one file; the largest mixtures of experts have a tenth of it in all their files."""

MAX_NAME, MAX_SEGMENTS = 1_000, 100
"""Characters of a tensor's name, and of the parts between its dots; real names have about a hundred, and ten parts."""

MAX_SIDES = 64
"""Sides of one tensor; torch has no more."""

_U64 = 2**64 - 1
_ENTRY = frozenset({"dtype", "shape", "data_offsets"})


class Decoded(Protocol):
    """How a weight that is stored as codes is read: `storage/codecs` has all of it."""

    @property
    def dtype(self) -> str:
        """The 16-bit dtype that it becomes where it is stored plainly."""
        ...

    def reader(self) -> AbstractContextManager[Callable[[memoryview, int], None]]:
        """Open it for reading as float32: a function of a buffer to fill, and its offset in bytes."""
        ...


class TensorSpec(NamedTuple):
    """What a header knows of a tensor: safetensors dtype, shape, and the bytes [`start`, `stop`) of `file`.

    A weight that is stored as codes has an `encoding`: it reads as float32, and its bytes lie nowhere (`start` is far
    below zero, so that a read past `files.opened` fails).
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    encoding: Decoded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start

    @property
    def plain_dtype(self) -> str:
        """Its dtype where it is written as numbers: its own, or the 16-bit dtype of a weight of codes."""
        return self.dtype if self.encoding is None else self.encoding.dtype

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Header(NamedTuple):
    """A safetensors header: tensors in the order of their data, and the string metadata."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file, without touching its data.

    Raises `BadFile` with one sentence that names the file and, where there is one, the tensor.
    """
    try:
        return _read_header(path)
    except BadFile:
        if path.with_name(f".{path.name}.edit").is_dir():  # of `storage/rewrite`
            hint = f"Bring it to its end: loratools edit {path}"
            raise BadFile(f"{path}: an edit of it was cut short", hint=hint) from None
        raise


def _read_header(path: Path) -> Header:
    key = "header", path
    if (known := remembered().get(key)) is not None:
        before, header = cast(tuple[Stamp, Header], known)
        if stamps(path.parent, [path.name]) == (before,):
            see(path)
            return header
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(32)
        refuse_pointer(prefix, path)
        length = int.from_bytes(prefix[:8], "little")
        if beginning := _text(prefix):
            raise BadFile(f"{path}: not a safetensors file but a text, which begins with {beginning!r}")
        if len(prefix) < 8 or length > size - 8:
            extent = f"{size} bytes" if len(prefix) < 8 else f"a header of {length} bytes in a file of {size}"
            raise BadFile(f"{path}: not a safetensors file, or truncated: found {extent}")
        if length > MAX_HEADER:
            raise BadFile(f"{path}: the header is {length} bytes long; safetensors allows {MAX_HEADER}")
        file.seek(8)
        raw = file.read(length)
    header = parse_header(raw, size, path)
    remember(key, (stamp(status), header))
    return header


def _text(prefix: bytes) -> str | None:
    """Return the first line of what begins as a text does, None for other bytes and for less than a length."""
    if len(prefix) < 8 or b"\0" in prefix:  # as every length of a header has it
        return None
    try:
        text = getincrementaldecoder("utf-8-sig")().decode(prefix)  # its last character may be cut
    except UnicodeDecodeError:
        return None
    seen = text.translate(dict.fromkeys(map(ord, "\t\r\n"), " "))
    return text.split("\n")[0].strip() or text.strip() if seen.isprintable() and text.strip() else None


def parse_header(raw: bytes, file_size: int, path: Path) -> Header:
    """Parse the JSON of a header and check it against the size of its file.

    `raw` is the JSON without its length prefix. Raises `BadFile`.
    """
    begin = 8 + len(raw)
    if (known := _alike(raw)) is not None:
        tensors, metadata = known
        # No `_replace`: a folder of adapters has thousands of tensors.
        ordered = {name: TensorSpec(x.dtype, x.shape, path, begin + x.start, begin + x.stop) for name, x in tensors}
    else:
        document = parse_json_object(raw, path)
        metadata = document.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise BadFile(f"{path}: __metadata__ must map strings to strings")
        ordered = _tensors(document, path, begin)
    expected = next(reversed(ordered.values())).stop if ordered else begin
    if expected != file_size:
        fault = "truncated" if expected > file_size else "bytes after the last tensor"
        raise BadFile(f"{path}: {fault}: the header describes {expected} bytes, the file has {file_size}")
    return Header(ordered, metadata)


def _tensors(document: Mapping[str, Any], path: Path, begin: int) -> dict[str, TensorSpec]:
    """Return the tensors of a header without its metadata, in the order of their data, which begin at `begin`."""
    if len(document) > MAX_TENSORS:
        raise BadFile(f"{path}: {len(document)} tensors in one file; at most {MAX_TENSORS} are read")
    tensors = [(name, _spec(name, entry, path, begin)) for name, entry in document.items()]
    ordered, expected = dict(sorted(tensors, key=_place)), begin
    for name, spec in ordered.items():
        if spec.start != expected:
            fault = "a hole before it" if spec.start > expected else "it overlaps another tensor"
            raise BadFile(f"{path}: tensor {name!r}: {fault} (begins at {spec.start}, expected {expected})")
        expected = spec.stop
    return ordered


def _alike(raw: bytes) -> tuple[_Named, dict[str, str]] | None:
    """Return the tensors, as of data that begin at 0, and the metadata of a header that differs in these from others.

    The adapters of one base have the same tensors. None for a header with no metadata first, a large one, or a fault.
    """
    if not raw.startswith(_FIRST) or b"\\u" in raw:
        return None
    try:
        text = raw.decode()
        metadata, end = _METADATA.raw_decode(text, len(_FIRST))
        if text[end : end + 1] != "," or len(text) - end > _LARGE or set(map(type, metadata.values())) != {str}:
            return None
        return _behind(text[end + 1 :]), metadata
    except (AttributeError, BadFile, RecursionError, ValueError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


_FIRST, _METADATA, _LARGE = b'{"__metadata__":', json.JSONDecoder(object_pairs_hook=_unique), 1 << 16

_Named = tuple[tuple[str, TensorSpec], ...]


@lru_cache(16)
def _behind(text: str) -> _Named:
    """Return the tensors that a header has behind its metadata, as of data that begin at 0; raise `BadFile`."""
    document = parse_json_object(f"{{{text}".encode(), Path())
    if "__metadata__" in document:
        raise BadFile("'__metadata__' occurs twice")
    return tuple(_tensors(document, Path(), 0).items())


def check_name(name: str, path: Path) -> None:
    """Raise `BadFile` for a tensor's name that is too long for work that grows faster than it does."""
    if len(name) > MAX_NAME:
        raise BadFile(
            f"{path}: a tensor with a name of {len(name)} characters, {name[:80]!r}…; at most {MAX_NAME} are read"
        )
    if name.count(".") >= MAX_SEGMENTS:
        raise BadFile(f"{path}: a tensor with a name of more than {MAX_SEGMENTS} segments, {name[:80]!r}…")


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Encode a header, length prefix included, for `(name, dtype, shape, nbytes)` whose data follow in this order.

    Metadata first, in sorted order, then the tensors as given; padded with spaces to a multiple of eight bytes, so
    that the data are aligned. Equal input gives equal bytes, which the safetensors library does not promise.
    """
    document: dict[str, Any] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes that a tensor of this dtype and shape takes; sub-byte dtypes are packed."""
    return prod(shape) * dtypes.bits(dtype) // 8


def _spec(name: str, entry: Any, path: Path, data_start: int) -> TensorSpec:
    if len(name) > MAX_NAME or name.count(".") >= MAX_SEGMENTS:
        check_name(name, path)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise BadFile(f"{path}: tensor {name!r}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = dtypes.BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise BadFile(f"{path}: tensor {name!r}: unknown dtype {dtype!r:.80}")
    numbers = [*shape, *offsets] if type(shape) is list and type(offsets) is list and len(offsets) == 2 else [None]
    for number in numbers:
        if type(number) is not int or not 0 <= number <= _U64:
            raise BadFile(f"{path}: tensor {name!r}: shape and data_offsets must be lists of natural numbers")
    if len(shape) > MAX_SIDES:
        raise BadFile(f"{path}: tensor {name!r}: a tensor of {len(shape)} sides; at most {MAX_SIDES} are read")
    elements = 1
    for side in shape:  # in this order, as the library multiplies: an overflow counts even if a zero follows
        elements *= side
        if elements > _U64:
            raise BadFile(f"{path}: tensor {name!r}: shape {shape} is larger than any file")
    size = elements * bits
    start, stop = offsets
    if size > _U64 or size % 8 or start > stop or stop - start != size // 8:
        takes = f"{dtype} of shape {shape} takes {size / 8:g} bytes"
        raise BadFile(f"{path}: tensor {name!r}: {takes}, its offsets {stop - start}")
    return TensorSpec(dtype, tuple(shape), path, data_start + start, data_start + stop)


def _place(item: tuple[str, TensorSpec]) -> tuple[int, int]:
    return item[1].start, item[1].stop
