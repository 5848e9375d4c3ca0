"""OpenCLIP's q, k and v, which a file holds as one weight: factored one by one, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter.naming.selection import Selection
from loratools.errors import LoraToolsError
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.extract import Extraction, extract, plan
from loratools.surgery.extract.fused import apart
from tests.surgery.models import random

AT = "conditioner.embedders.1.model.transformer.resblocks.{}.attn.in_proj_weight"
UNET = "model.diffusion_model.input_blocks.0.0.weight"
N, M = 24, 20
"""Rows of q, of k and of v, and their columns."""


def models(folder: Path, layers: int = 2, rows: int = 3 * N) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    """Write base and fine-tune: q, k, v differ by full rank, and each by another strength; return both in float64."""
    before = {AT.format(i): random(rows, M, seed=i) for i in range(layers)} | {UNET: random(8, 8, seed=9)}
    strength = (torch.arange(1, 4).repeat_interleave(N) / 30)[:rows].view(-1, 1)
    after = {name: W + 0.1 * random(*W.shape, seed=70 + i) * (strength if len(W) == rows else 1)
             for i, (name, W) in enumerate(before.items())}  # fmt: skip
    for name, weights in (("base", before), ("tuned", after)):
        save_file(weights, folder / f"{name}.safetensors")
    wide = [{name: W.double() for name, W in weights.items()} for weights in (before, after)]
    return folder / "base.safetensors", folder / "tuned.safetensors", *wide


def part(i: int, letter: str) -> str:
    return AT.format(i).replace("in_proj_weight", f"{letter}_proj.weight")


def factored(extraction: Extraction) -> dict[str, int]:
    return {one.pair.name: one.rank for one in extraction.of("factored")}


def test_each_part_is_the_best_of_its_own_rank(tmp_path: Path) -> None:
    base, tuned, before, after = models(tmp_path)
    extraction = extract(base, tuned, tmp_path / "out.safetensors", Ranks(Fixed(4)))
    layers = {one.pair.name: one.layer for one in extraction.of("factored")}
    assert layers.keys() == {UNET, *(part(i, letter) for i in range(2) for letter in "qkv")}
    written = load_file(tmp_path / "out.safetensors")
    for i in range(2):
        for at, letter in enumerate("qkv"):
            rows = slice(at * N, (at + 1) * N)
            D = after[AT.format(i)][rows] - before[AT.format(i)][rows]
            key = f"lora_te2_text_model_encoder_layers_{i}_self_attn_{letter}_proj"
            B, A = (written[f"{key}.lora_{side}.weight"].double() for side in ("up", "down"))
            scale = float(written[f"{key}.alpha"]) / len(A)
            error, sigmas = float((D - scale * B @ A).norm()), torch.linalg.svdvals(D)
            layer = layers[part(i, letter)]
            assert layer is not None
            assert (len(A), layer.rank, layer.shape) == (4, 4, (N, M))
            assert error == pytest.approx(float(sigmas[4:].norm()), rel=1e-5)
            assert layer.error == pytest.approx(error / float(D.norm()), rel=1e-5)
            assert layer.delta_norm == pytest.approx(float(D.norm()), rel=1e-6)
            assert layer.base_norm == pytest.approx(float(before[AT.format(i)][rows].norm()), rel=1e-6)
            assert layer.stable_rank == pytest.approx(float(sigmas.square().sum() / sigmas[0] ** 2), rel=1e-3)


def test_views_are_the_bytes_of_their_rows(tmp_path: Path) -> None:
    base, tuned, before, _ = models(tmp_path)
    opened = Checkpoint.open(base)
    view, other, selection = apart(opened, Checkpoint.open(tuned), Selection())
    assert selection == Selection()
    for at, letter in enumerate("qkv"):
        name = part(1, letter)
        assert torch.equal(view.read(name).double(), before[AT.format(1)][at * N : (at + 1) * N])
        assert (view.origin(name), view.specs[name].shape) == (AT.format(1), (N, M))
        assert name in other.specs
    assert AT.format(1) not in view.specs
    assert view.schema() == opened.schema()
    assert view.nbytes == opened.nbytes


@pytest.mark.parametrize(
    ("include", "wanted"),
    [
        ("*in_proj_weight", [part(i, letter) for i in range(2) for letter in "qkv"]),
        ("in_proj_weight", [part(i, letter) for i in range(2) for letter in "qkv"]),
        ("*resblocks.1.attn.in_proj_weight", [part(1, letter) for letter in "qkv"]),
        ("q_proj", [part(0, "q"), part(1, "q")]),
        ("*.resblocks.0.attn.*", [part(0, letter) for letter in "qkv"]),
        ("model.diffusion_model.*", [UNET]),
    ],
)
def test_what_an_included_name_selects(tmp_path: Path, include: str, wanted: list[str]) -> None:
    base, tuned, *_ = models(tmp_path)
    selection = Selection(include=(include,))
    extraction = extract(base, tuned, tmp_path / "out.safetensors", Ranks(Fixed(2)), selection=selection)
    assert factored(extraction) == dict.fromkeys(wanted, 2)
    assert {one.pair.why for one in extraction.of("dropped")} == {"not in --include"}
    planned = plan(base, tuned, selection)
    assert sorted(pair.name for pair in planned.pairs if pair.plan == "factor") == sorted(wanted)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(exclude=("*in_proj_weight",)), [UNET]),
        (Selection(save=("*.0.attn.in_proj_weight",)), [UNET, *(part(1, letter) for letter in "qkv")]),
        (Selection(exclude=("q_proj",)), [UNET, *(part(i, letter) for i in range(2) for letter in "kv")]),
        (Selection(include=("*in_proj_weight",), exclude=("v_proj",)),
         [part(i, letter) for i in range(2) for letter in "qk"]),
    ],
)  # fmt: skip
def test_what_is_left_in_one(tmp_path: Path, selection: Selection, names: list[str]) -> None:
    base, tuned, *_ = models(tmp_path)
    extraction = extract(base, tuned, tmp_path / "out.safetensors", Ranks(Fixed(2)), selection=selection)
    assert factored(extraction) == dict.fromkeys(names, 2)
    saved = [one.pair.name for one in extraction.of("whole")]
    assert saved == ([AT.format(0)] if selection.save else [])


def test_rows_that_three_do_not_share_stay_in_one(tmp_path: Path) -> None:
    base, tuned, *_ = models(tmp_path, rows=3 * N - 2)
    view, _, _ = apart(Checkpoint.open(base), Checkpoint.open(tuned), Selection())
    assert AT.format(0) in view.specs
    with pytest.raises(LoraToolsError, match="names no module"):
        extract(base, tuned, tmp_path / "out.safetensors", 2, selection=Selection(include=("q_proj",)))
