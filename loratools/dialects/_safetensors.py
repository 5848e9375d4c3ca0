"""Write a safetensors file of lazy tensors, byte for byte the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.storage import atomic, dtypes, files
from loratools.storage.header import encode_header
from loratools.storage.lazy import LazyTensor


def write(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, wide dtypes first so that all stay aligned, then by name; stored ones are copied unread."""
    ordered = sorted(tensors.items(), key=lambda item: (-dtypes.bits(item[1].dtype), item[0]))
    with path.open("wb") as output:
        output.write(encode_header(((name, lazy.dtype, lazy.shape, lazy.nbytes) for name, lazy in ordered), metadata))
        for name, lazy in ordered:
            for piece in files.chunks(lazy.spec) if lazy.spec else [_bytes(name, lazy)]:
                output.write(piece)


def save(
    target: Path,
    name: str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    force: bool,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write `target`, a single file, or a folder that holds it as `name` and the texts `beside` it; atomically."""
    if target.suffix == ".safetensors":
        with atomic.new_file(target, force=force) as path:
            write(path, tensors, metadata)
        return
    with atomic.new_folder(target, force=force) as folder:
        for other, text in (beside or {}).items():
            (folder / other).write_text(text, encoding="utf-8")
        write(folder / name, tensors, metadata)


def _bytes(name: str, lazy: LazyTensor) -> memoryview:
    import torch

    tensor = lazy.load().detach().cpu().contiguous()
    if dtypes.from_torch(tensor.dtype) != lazy.dtype or tuple(tensor.shape) != lazy.shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise LoraToolsError(f"tensor {name!r} became {found} when loaded; announced were {lazy.dtype} {lazy.shape}")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
