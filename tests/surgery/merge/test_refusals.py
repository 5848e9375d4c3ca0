"""Merges that must not happen: nothing would change, numbers would be lost, or something would be overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.errors import IncompatibleAdapter, OutputRefused, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from tests.surgery.models import DTYPES, Lora, load, lora, random, same_bytes, save, save_adapter, weights_of

SHAPES = {"block.0.up": (300, 400), "block.0.down": (400, 300), "block.1.up": (300, 400)}


def test_a_zero_change_is_refused(tmp_path: Path) -> None:
    shape = {"a": (8, 8)}
    base, _ = save(tmp_path, weights_of(shape, torch.bfloat16), [])
    A, B = lora(shape, rank=2).factors["a"]
    hole = torch.tensor([[1.0], [0.0]])
    idle = {
        "B": Lora({"a": (A, B * 0)}),
        "A": Lora({"a": (A * 0, B)}),
        "alpha": Lora({"a": (A, B)}, alpha=0),
        "meet": Lora({"a": (A * hole, B * (1 - hole.T))}),  # no rank is non-zero in both
    }
    sound = save_adapter(tmp_path / "sound", Lora({"a": (A * hole, B)}))
    for name, one in idle.items():
        path = save_adapter(tmp_path / name, one)
        with pytest.raises(IncompatibleAdapter, match="change nothing") as refusal:
            merge(base, [sound, path], tmp_path / "out")
        assert refusal.value.problems == ("adapter 2: s·B·A is zero in every module, as before training",)
        assert not (tmp_path / "out").exists()
    with pytest.raises(IncompatibleAdapter) as refusal:
        merge(base, [sound], tmp_path / "out", weights=[0])
    assert refusal.value.problems == ("adapter 1: its weight is 0",)
    assert merge(base, [sound], tmp_path / "out").changed == 1


def test_a_zero_module_among_others_is_not(tmp_path: Path) -> None:
    one = lora(SHAPES)
    A, B = one.factors["block.0.up"]
    base, paths = save(
        tmp_path, weights_of(SHAPES, torch.bfloat16), [replace(one, factors={**one.factors, "block.0.up": (A, B * 0)})]
    )
    assert merge(base, paths, tmp_path / "out").changed == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", [0, 1])
def test_factors_that_are_not_finite(value: float, factor: int, tmp_path: Path) -> None:
    adapter = lora({"a": (8, 8), "b": (8, 8)})
    adapter.factors["b"][factor][1, 2] = value
    base, paths = save(tmp_path, weights_of({"a": (8, 8), "b": (8, 8)}, torch.bfloat16), [adapter])
    with pytest.raises(IncompatibleAdapter, match=r"adapter 1: b has NaN or infinite factors \(for b\.weight\)"):
        merge(base, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_result_that_overflows(dtype: str, tmp_path: Path) -> None:
    weights = weights_of({"a": (8, 8)}, DTYPES[dtype])
    weights["a.weight"][3, 4] = torch.finfo(DTYPES[dtype]).max
    adapter = Lora({"a": (torch.ones(1, 8), torch.ones(8, 1))}, alpha=float(torch.finfo(DTYPES[dtype]).max) / 2)
    base, paths = save(tmp_path, weights, [adapter])
    with pytest.raises(IncompatibleAdapter, match=rf"a\.weight: the merged values are not finite in {dtype}"):
        merge(base, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_targets(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {
        "a.weight": torch.zeros(8, 8, dtype=torch.int8),
        "b.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "c.weight": random(8, 8),
    }
    base, paths = save(tmp_path, weights, [lora({"a": (8, 8), "b": (8, 8), "c": (8, 8)}), lora({"c": (8, 8)})])
    with pytest.raises(IncompatibleAdapter, match=r"quantized with I8 codes, and 1 module ") as refusal:
        merge(base, paths[:1], tmp_path / "out")
    assert refusal.value.problems == ("a: I8 codes",)
    merge(base, paths[1:], tmp_path / "out", quantized="partial")
    found = load(tmp_path / "out")
    assert all(same_bytes(found[name], weights[name]) for name in ("a.weight", "b.weight"))


def test_one_flipped_bit_in_a_sealed_base(workplace: Path) -> None:
    """The tensor is named, and nothing is left; an untouched tensor is not looked at."""
    shards = {file: load_file_of(file) for file in sorted((workplace / "base").glob("*.safetensors"))}
    assert merge(workplace / "base", [workplace / "sealed"], workplace / "good").verified == 4
    for name, refused in (("model.layers.1.self_attn.q_proj.weight", True), ("model.norm.weight", False)):
        file = next(file for file, tensors in shards.items() if name in tensors)
        spec = Checkpoint.open(workplace / "base").specs[name]
        raw = bytearray(file.read_bytes())
        raw[spec.start + 1] ^= 1
        file.write_bytes(raw)
        out = workplace / name
        if refused:
            with pytest.raises(WrongBase, match=name):
                merge(workplace / "base", [workplace / "sealed"], out)
            assert not out.exists()
        else:
            merge(workplace / "base", [workplace / "sealed"], out)
        raw[spec.start + 1] ^= 1
        file.write_bytes(raw)


def load_file_of(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    base, paths = save(tmp_path, weights_of(SHAPES, torch.bfloat16), [lora(SHAPES), lora(SHAPES, seed=7)])
    before = load(base)
    (tmp_path / "taken").mkdir()
    for out in (base, base / "inside", paths[0], tmp_path, tmp_path / "taken"):
        with pytest.raises(OutputRefused):
            merge(base, paths[:1], out, force=out != tmp_path / "taken")
    merge(base, paths[:1], tmp_path / "once")
    with pytest.raises(OutputRefused, match="already is a merge of this adapter"):
        merge(tmp_path / "once", paths[:1], tmp_path / "twice")
    merge(tmp_path / "once", paths[1:], tmp_path / "both")
    assert all(same_bytes(W, before[name]) for name, W in load(base).items())
