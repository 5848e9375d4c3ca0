"""The bytes of a merge do not depend on how it was run; what is not touched comes through as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools.engine.device import TILES
from loratools.engine.run import Settings, write_weights
from loratools.storage import files
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import MergeOptions, merge, prepare
from tests.faults.killer import hashes
from tests.make import tiny


def three(model: Path) -> tuple[list[Path], list[float]]:
    tiny.save_peft(model / "other", tiny.lora_factors(tiny.SHAPES, rank=3, seed=2), alpha=5)
    tiny.save_peft(model / "third", tiny.lora_factors(tiny.SHAPES, rank=8, seed=3), alpha=1)
    return [model / "adapter", model / "other", model / "third"], [1.0, -0.5, 0.25]


@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
def test_threads_and_the_order_of_adapters_do_not_show(model: Path, dtype: str | None) -> None:
    adapters, weights = three(model)
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        for threads in (1, 2, 5):
            output = model / f"{order}{threads}"
            merge(
                model / "base", [adapters[i] for i in order], output, weights=[weights[i] for i in order],
                dtype=dtype, threads=threads, retention="off",
            )  # fmt: skip
            outputs.append({name: value for name, value in hashes(output).items() if name.endswith(".safetensors")})
    assert outputs[0].keys() == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert all(files_of_run == outputs[0] for files_of_run in outputs)


@pytest.mark.parametrize("dtype", [None, "F32", "F64"])
def test_the_size_of_tiles_does_not_show(model: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in torch, whose blocks are made small here: they go by the tensor's shape alone."""
    monkeypatch.setitem(TILES, "cpu", 2000)
    adapters, weights = three(model)
    prepared = prepare(
        model / "base", adapters, model / "out", weights=weights, options=MergeOptions(dtype=dtype, threads=1)
    )
    made = []
    for tile in (1, 5000, 1 << 20):
        folder = model / f"tiles of {tile}"
        folder.mkdir()
        settings = Settings(2, retention="off", tile_bytes=tile)
        write_weights(prepared.plan, folder, settings, lambda _: None)
        made.append(hashes(folder))
    assert made[0] == made[1] == made[2]


def test_two_runs_give_the_same_files(model: Path) -> None:
    for name in ("a", "b"):
        merge(model / "base", [model / "adapter"], model / name, threads=1 if name == "a" else 3)
    assert hashes(model / "a") == hashes(model / "b")


def test_untouched_tensors_of_every_dtype_come_through(model: Path) -> None:
    """Sub-byte and 8-bit dtypes, empty tensors, and what no array library knows."""
    weights = tiny.llama_weights()
    raw = {"F4": 3, "F6_E2M3": 3, "F6_E3M2": 3, "F8_E8M0": 5, "F8_E5M2FNUZ": 5, "BOOL": 2, "U64": 16, "C64": 8}
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    path = model / "base" / "model.safetensors"
    for old in (model / "base").iterdir():
        old.unlink()
    save_file(weights, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    extra = {}
    for i, (dtype, size) in enumerate(raw.items()):
        size_bits = bits.get(dtype, 8 * {"U64": 8, "C64": 8}.get(dtype, 1))
        extra[dtype] = bytes([17 * i + k & 255 for k in range(size)])
        header[dtype] = {
            "dtype": dtype,
            "shape": [size * 8 // size_bits],
            "data_offsets": [len(body), len(body) + size],
        }
        body += extra[dtype]
    header["none"] = {"dtype": "F6_E2M3", "shape": [0, 5], "data_offsets": [len(body), len(body)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    for name, options in {"same": {}, "cut": {"max_shard_size": 9000}, "cast": {"dtype": "F32"}}.items():
        merge(model / "base", [model / "adapter"], model / name, **options)
        checkpoint = Checkpoint.open(model / name)
        for dtype, content in extra.items():
            spec = checkpoint.specs[dtype]
            assert (spec.dtype, bytes(files.read_bytes(spec))) == (dtype, content), (name, dtype)
        assert checkpoint.specs["none"].shape == (0, 5)
    with safe_open(model / "same" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.norm.weight"), weights["model.norm.weight"])
