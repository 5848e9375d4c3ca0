"""Tensors read one after another: their own bytes, in their order, whether of files or in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor, chunks_of_all, in_order_of_files


def lazies(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    held = {name: torch.randn(3, size, generator=generator) for name, size in (("d", 4), ("b", 1), ("c", 7), ("a", 2))}
    save_file({name: held[name] for name in "ac"}, folder / "two.safetensors")
    save_file({name: held[name] for name in "bd"}, folder / "one.safetensors")
    stored = {
        name: LazyTensor.stored(spec)
        for file in ("one", "two")
        for name, spec in read_header(folder / f"{file}.safetensors").tensors.items()
    }
    held["m"] = torch.arange(5).float()
    tensors = {name: stored[name] for name in "dcab"}
    return {"d": tensors["d"], "m": LazyTensor.of(held["m"]), **tensors}, held


def test_every_tensor_has_its_own_bytes_in_the_order_asked_for(tmp_path: Path) -> None:
    tensors, held = lazies(tmp_path)
    read = {name: b"".join(map(bytes, pieces)) for name, pieces in chunks_of_all(tensors)}
    assert list(read) == ["d", "m", "c", "a", "b"]
    assert read == {name: held[name].numpy().tobytes() for name in read}


def test_the_order_of_files_is_that_of_their_bytes(tmp_path: Path) -> None:
    tensors, _ = lazies(tmp_path)
    names = list(in_order_of_files(tensors))
    assert names[-1] == "m"
    specs = [tensors[name].spec for name in names[:-1]]
    places = [(spec.file.name, spec.start) for spec in specs if spec]
    assert places == sorted(places)
    assert len(places) == 4
