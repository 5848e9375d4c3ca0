"""GGUF files: adapters through the `gguf` package, which is an extra; bases by their container alone.

container   the header: fields as bytes, tensors with where they lie
types       ggml's types of tensors
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, MissingExtra, UnsupportedAdapter
from loratools.storage import atomic, dtypes
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes, as GGUF numbers them."""

MAX_ITEMS = 100_000
"""Fields, tensors, and values of arrays of one file, a thousand in an adapter: the package makes an object of each."""

_DEEPEST, _MOST_SIDES = 4, 8


def package() -> Any:
    """Return the `gguf` package; raise `MissingExtra` if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("GGUF files need the gguf package", hint="pip install 'loratools[gguf]'") from None
    return gguf


def read(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the fields (lists and strings as Python has them) and the tensors, unread, row-major.

    Raises `BadFile` for a damaged file, `UnsupportedAdapter` for quantized tensors.
    """
    gguf = package()
    check_counts(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        specs = {tensor.name: _spec(path, tensor) for tensor in reader.tensors}
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        raise BadFile(f"{path}: damaged GGUF file: {reason}") from None
    if odd := [f"{name}: {spec.dtype}" for name, spec in specs.items() if spec.dtype not in dtypes.FLOATS]:
        raise UnsupportedAdapter(f"{path}: quantized tensors of an adapter are not read", odd[:12])
    size = path.stat().st_size
    if outside := [name for name, spec in specs.items() if spec.stop > size]:
        raise BadFile(f"{path}: truncated: {outside[0]} ends after the file")
    return fields, {name: LazyTensor.stored(spec) for name, spec in specs.items()}


def check_counts(path: Path) -> None:
    """Raise `BadFile` where the header counts more than the file holds; time and memory are linear in its size.

    The `gguf` package believes every count, and reads on, or asks for as much memory, for as long as the count says.
    """
    size = path.stat().st_size
    items = 0
    with path.open("rb") as file:

        def count(number: int) -> int:
            nonlocal items
            items += number
            if number > (left := size - file.tell()):
                raise BadFile(f"{path}: damaged GGUF file: it counts {number} items where {left} bytes follow")
            if items > MAX_ITEMS:
                raise BadFile(f"{path}: a GGUF header of more than {MAX_ITEMS} fields, values and tensors")
            return number

        def take(form: str) -> int:
            raw = file.read(struct.calcsize(form))
            if len(raw) < struct.calcsize(form):
                raise BadFile(f"{path}: damaged GGUF file: it ends in its header")
            return int(struct.unpack(order + form, raw)[0])

        def skip(number: int, each: int) -> None:
            if number * each > (left := size - file.tell()):
                raise BadFile(f"{path}: damaged GGUF file: it counts {number} items where {left} bytes follow")
            file.seek(number * each, os.SEEK_CUR)

        def value(kind: int, depth: int) -> None:
            if kind in _WIDTHS:
                skip(1, _WIDTHS[kind])
            elif kind == _STRING:
                skip(take("Q"), 1)
            elif kind == _ARRAY and depth < _DEEPEST:
                inner, number = take("I"), take("Q")
                if inner in _WIDTHS:
                    skip(count(number), _WIDTHS[inner])
                    return
                for _ in range(count(number)):
                    value(inner, depth + 1)
            else:
                raise BadFile(f"{path}: damaged GGUF file: a value of type {kind} at depth {depth}")

        order = "<"
        if file.read(4) != b"GGUF":
            raise BadFile(f"{path}: not a GGUF file")
        if not take("I") & 0xFFFF:
            order = ">"  # what it read is the version, the other way round
        tensors, fields = take("Q"), take("Q")
        for _ in range(count(fields)):
            skip(take("Q"), 1)
            value(take("I"), 0)
        for _ in range(count(tensors)):
            skip(take("Q"), 1)
            sides = take("I")
            if sides > _MOST_SIDES:
                raise BadFile(f"{path}: damaged GGUF file: a tensor of {sides} sides")
            shape = [take("Q") for _ in range(sides)]
            if max(prod(shape), *shape, 0) > 8 * size:
                raise BadFile(f"{path}: damaged GGUF file: a tensor of shape {shape} in a file of {size} bytes")
            take("I")
            take("Q")


def _spec(path: Path, tensor: Any) -> TensorSpec:
    start, shape = int(tensor.data_offset), tuple(map(int, reversed(tensor.shape)))
    return TensorSpec(tensor.tensor_type.name, shape, path, start, start + int(tensor.n_bytes))


def save(
    target: Path, name: str, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *,
    force: bool,
) -> None:  # fmt: skip
    """Write `target`, a .gguf file, or a folder that holds it as `name`; atomically."""
    package()
    with atomic.new_output(target, name, force=force) as path:
        _write(path, architecture, fields, tensors)


def _write(path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> None:
    import torch

    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for name, value in fields.items():
        add[type(value)](name, value)
    types = gguf.GGMLQuantizationType
    for name, lazy in tensors.items():
        tensor = lazy.load().contiguous()
        if lazy.dtype == "BF16":
            raw = tensor.view(torch.uint16).numpy().view("uint8")
            writer.add_tensor(name, raw, raw_dtype=types.BF16)
        else:
            writer.add_tensor(name, tensor.numpy() if lazy.dtype in ("F16", "F32") else tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
