"""Tensors read one after another: their own bytes, in their order, whether of files or in memory."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.parallel.plain import NotPlain, from_plain, to_plain
from loratools.storage import files
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor, chunks_of_all, in_order_of_files
from loratools.storage.save import Appended, Spool


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


def test_a_tensor_in_a_file_travels_as_its_place_and_one_in_memory_as_its_bytes(tmp_path: Path) -> None:
    numbers = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    held = LazyTensor.of(numbers)
    stored = Spool(tmp_path / "spool").stored(held)
    assert from_plain(json.loads(json.dumps(to_plain(stored)))).spec == stored.spec
    with pytest.raises(NotPlain, match=r"value\[0\] is a LazyTensor that is held in memory"):
        to_plain([held])
    for lazy in (held, stored):
        back = pickle.loads(pickle.dumps(lazy))  # noqa: S301  (our own)
        assert (back.dtype, back.shape, back.spec) == ("BF16", (2, 3), lazy.spec)
        assert torch.equal(back.load(), numbers)


def test_pieces_of_any_size_lie_one_after_the_other(tmp_path: Path) -> None:
    sizes = [3, 0, files.CHUNK - 1, 2, files.CHUNK, files.CHUNK + 5, 1, 7]
    pieces = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    with files.descriptor(tmp_path / "file", os.O_RDWR | os.O_CREAT) as target:
        appended = Appended(target, 10)
        for piece in pieces:
            appended.write(memoryview(bytearray(piece)))
        assert appended.end == 10 + sum(sizes)
        appended.flush()
    assert (tmp_path / "file").read_bytes() == bytes(10) + b"".join(pieces)


def test_a_tensor_of_several_pieces_is_spooled_whole(tmp_path: Path) -> None:
    X = torch.randn(700, 1000, generator=torch.Generator().manual_seed(1))
    save_file({"x": X}, tmp_path / "x.safetensors")
    lazy = LazyTensor.stored(read_header(tmp_path / "x.safetensors").tensors["x"])
    assert len([len(piece) for piece in lazy.chunks("x")]) > 2
    assert torch.equal(Spool(tmp_path / "spool").stored(lazy).load(), X)
