"""Write a safetensors file of lazy tensors, byte for byte the same every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.storage import atomic, dtypes, files
from loratools.storage.header import encode_header
from loratools.storage.lazy import LazyTensor


def write(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, wide dtypes first so that all stay aligned, then by name; stored ones are copied unread."""
    with path.open("wb") as output:
        output.write(header(tensors, metadata))
        for piece in pieces(tensors):
            output.write(piece)


def header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header that `write` begins with, length prefix included."""
    entries = ((name, lazy.dtype, lazy.shape, lazy.nbytes) for name, lazy in _ordered(tensors))
    return encode_header(entries, metadata)


def pieces(tensors: Mapping[str, LazyTensor]) -> Iterator[memoryview]:
    """Yield the data that `write` puts after the header, each piece valid until the next is asked for."""
    for name, lazy in _ordered(tensors):
        yield from files.chunks(lazy.spec) if lazy.spec else [_bytes(name, lazy)]


def _ordered(tensors: Mapping[str, LazyTensor]) -> list[tuple[str, LazyTensor]]:
    return sorted(tensors.items(), key=lambda item: (-dtypes.bits(item[1].dtype), item[0]))


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
