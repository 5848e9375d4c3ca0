"""The container of a GGUF file: fields as their bytes, tensors with where they lie; read and written without a package.

    "GGUF", u32 version, u64 tensors, u64 fields; each field: string key, u32 type, value; each tensor: string name,
    u32 sides, u64 each side (the last of ours first), u32 type, u64 offset from the data, which begin at a multiple of
    `general.alignment` (32), as every tensor does

Fields are kept as the bytes that they are in the file, so that what is not understood is written again as it was.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.gguf.types import BY_NUMBER, TYPES
from loratools.storage.header import MAX_NAME, MAX_TENSORS, TensorSpec
from loratools.storage.sources import open_file

MAGIC = b"GGUF"
MAX_VALUES = 4_000_000
"""Values of all arrays of strings; a vocabulary has a quarter of a million, and as many merges."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _U32 = 8, 9, 4
_DEEPEST, _MOST_SIDES, _MOST_FIELDS = 4, 8, 100_000

Value = int | float | bool | str | list[int] | list[float] | list[str]


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its type, and its value as bytes."""

    kind: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Container:
    """A GGUF file's header: version, alignment, fields by key in their order, and tensors by name in theirs.

    The dtype of a tensor is ggml's name of its type, its shape has the last side last, as everywhere here.
    """

    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)

    def get(self, key: str) -> Value | None:
        """Return a field's value, also a list of numbers or strings; None where there is none of that key."""
        stored = self.fields.get(key)
        return None if stored is None else _value(stored)

    def with_text(self, key: str, text: str) -> Container:
        """Return the header with one more field, a string."""
        return replace(self, fields={**self.fields, key: Field(_STRING, _string(text))})

    def header(self, tensors: Sequence[tuple[str, str, tuple[int, ...]]], changed: Mapping[str, int]) -> bytes:
        """Return the bytes before the data of a file with these tensors (name, type, shape), and u32 fields changed."""
        fields = {**self.fields, **{key: Field(_U32, struct.pack("<I", value)) for key, value in changed.items()}}
        out = bytearray(MAGIC + struct.pack("<IQQ", self.version, len(tensors), len(fields)))
        for key, stored in fields.items():
            out += _string(key) + struct.pack("<I", stored.kind) + stored.raw
        for (name, kind, shape), offset in zip(tensors, self.offsets(tensors), strict=True):
            sides = tuple(reversed(shape))
            out += _string(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
            out += struct.pack("<IQ", TYPES[kind].number, offset)
        return bytes(out.ljust(_aligned(len(out), self.alignment), b"\0"))

    def offsets(self, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[int]:
        """Return where each tensor begins, counted from the beginning of the data."""
        offsets, at = [], 0
        for _, kind, shape in tensors:
            offsets.append(at)
            at = _aligned(at + nbytes(kind, shape), self.alignment)
        return offsets


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of a ggml type; raise `ValueError` where its rows are not whole blocks."""
    columns = shape[-1] if shape else 1
    return prod(shape[:-1]) * TYPES[kind].row(columns)


def read_container(path: Path) -> Container:
    """Read a GGUF header; time and memory are linear in its size, whatever it counts.

    Raises `BadFile` for a damaged file, `UnsupportedAdapter` for one of another byte order or of an unknown type.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        if size < 24:
            raise BadFile(f"{path}: not a GGUF file: {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).container()


class _Reader:
    """Walks through a header, and never past the file's end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at, self.values = path, data, size, 0, 0

    def container(self) -> Container:
        if self.take(4) != MAGIC:
            raise BadFile(f"{self.path}: not a GGUF file")
        version = self.number("I")
        if not version & 0xFFFF:
            raise UnsupportedAdapter(f"{self.path}: a GGUF file of big-endian numbers is not read")
        if version not in (2, 3):
            raise UnsupportedAdapter(f"{self.path}: version {version} of GGUF is not known; 2 and 3 are")
        tensors, fields = self.number("Q"), self.number("Q")
        self.fits(tensors, MAX_TENSORS, "tensors")
        self.fits(fields, _MOST_FIELDS, "fields")
        stored: dict[str, Field] = {}
        for _ in range(fields):
            key = self.string()
            kind = self.number("I")
            start = self.at
            self.skip(kind, 0)
            if key in stored:
                raise self.damaged(f"the field {key!r} twice")
            stored[key] = Field(kind, bytes(self.data[start : self.at]))
        infos = [self.tensor() for _ in range(tensors)]
        alignment = _value(stored["general.alignment"]) if "general.alignment" in stored else 32
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8 or alignment > 1 << 20:
            raise self.damaged(f"general.alignment is {alignment!r}")
        begin = _aligned(self.at, alignment)
        specs: dict[str, TensorSpec] = {}
        for name, ggml, shape, offset in infos:
            start = begin + offset
            try:
                stop = start + nbytes(ggml, shape)
            except ValueError as error:
                raise self.damaged(f"tensor {name!r}: {error}") from None
            if name in specs or offset % alignment or stop > self.size:
                fault = "twice" if name in specs else "not aligned" if offset % alignment else "ends after the file"
                raise self.damaged(f"tensor {name!r}: {fault}")
            specs[name] = TensorSpec(ggml, shape, self.path, start, stop)
        self.refuse_overlap(specs)
        return Container(version, alignment, stored, specs)

    def refuse_overlap(self, specs: Mapping[str, TensorSpec]) -> None:
        end = 0
        for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].stop)):
            if spec.start < end and spec.nbytes:
                raise self.damaged(f"tensor {name!r} overlaps another")
            end = max(end, spec.stop)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name, sides = self.string(), self.number("I")
        if len(name) > MAX_NAME or sides > _MOST_SIDES:
            raise self.damaged(f"a tensor of {sides} sides, or a name of {len(name)} characters")
        shape = tuple(reversed([self.number("Q") for _ in range(sides)]))
        if max(prod(shape), *shape, 0) > 8 * self.size:
            raise self.damaged(f"tensor {name!r} of shape {list(shape)} in a file of {self.size} bytes")
        number, offset = self.number("I"), self.number("Q")
        if number not in BY_NUMBER:
            raise UnsupportedAdapter(f"{self.path}: tensor {name!r} is of ggml type {number}, which is not known here")
        return name, BY_NUMBER[number].name, shape, offset

    def skip(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self.take(_SIZES[kind])
        elif kind == _STRING:
            self.take(self.number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.take(count * _SIZES[inner])
                return
            self.values += count
            self.fits(count, MAX_VALUES, "values")
            self.fits(self.values, MAX_VALUES, "values")
            for _ in range(count):
                self.skip(inner, depth + 1)
        else:
            raise self.damaged(f"a value of type {kind} at depth {depth}")

    def fits(self, count: int, most: int, what: str) -> None:
        if count > min(most, self.size - self.at):
            raise self.damaged(f"it counts {count} {what} where {self.size - self.at} bytes follow")

    def take(self, count: int) -> bytes | None:
        if count > self.size - self.at:
            raise self.damaged("it ends in its header")
        start, self.at = self.at, self.at + count
        return self.data[start : self.at] if count <= 1 << 16 else None

    def number(self, form: str) -> int:
        raw = self.take(struct.calcsize(f"<{form}"))
        assert raw is not None
        return int(struct.unpack(f"<{form}", raw)[0])

    def string(self) -> str:
        raw = self.take(length := self.number("Q"))
        if raw is None:
            raise self.damaged(f"a name of {length} bytes")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"a name that is no UTF-8: {raw[:40]!r}") from None

    def damaged(self, what: str) -> BadFile:
        return BadFile(f"{self.path}: damaged GGUF file: {what}")


def _value(stored: Field) -> Value:
    """Return what the bytes of a field say."""
    kind, raw = stored.kind, stored.raw
    if kind in _FORMATS:
        number: int | float | bool = struct.unpack(f"<{_FORMATS[kind]}", raw)[0]
        return number
    if kind == _STRING:
        return raw[8:].decode(errors="replace")
    inner, count = struct.unpack_from("<IQ", raw)
    if inner in _FORMATS:
        return list(struct.unpack_from(f"<{count}{_FORMATS[inner]}", raw, 12))
    return list(_strings(raw, count)) if inner == _STRING else []


def _strings(raw: bytes, count: int) -> Iterator[str]:
    at = 12
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        yield raw[at + 8 : at + 8 + length].decode(errors="replace")
        at += 8 + length


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
