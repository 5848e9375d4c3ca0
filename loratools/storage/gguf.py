"""Read and write GGUF files: fields and tensors, through the `gguf` package, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, MissingExtra, UnsupportedAdapter
from loratools.storage import atomic, dtypes
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor


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
