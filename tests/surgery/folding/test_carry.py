"""An adapter of the original, carried into a folded AWQ base: judged by logits, beside the naive merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from loratools.decisions import warnings_to
from loratools.errors import IncompatibleAdapter, WrongBase
from tests.make import folded_models
from tests.make.folded_models import FOLDS, LINEARS, SMOOTHED, Folded, adapter, awq, llama, logits

pytest.importorskip("transformers")

IN_NORMS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"]
ESTIMATED = ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def model(folder: Path, **options: Any) -> Folded:
    folds = options.pop("folds", FOLDS)
    return awq(folder, llama(folder / "original", **options), folds=folds)


def errors(folder: Path, made: Folded, modules: list[str]) -> tuple[float, float]:
    """Return the errors on the logits of the carried and of the naive merge, over the effect of the adapter."""
    deltas = adapter(folder / "lora", modules, made.weights)
    before = logits(made.original, made.unfolded)
    wanted = logits(made.original, {name: W + deltas.get(name, 0) for name, W in made.unfolded.items()})
    each = []
    for options in ({"original": made.original}, {"trained_on": "folded"}):
        loratools.merge(made.base, folder / "lora", folder / "out", dtype="f32", force=True, **options)  # type: ignore[arg-type]
        each.append(float((logits(folder / "out") - wanted).norm() / (wanted - before).norm()))
    print(f"{folder.name}: carried {each[0]:.1e} of the effect, naive {each[1]:.2f}")
    return each[0], each[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_in_norms_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    carried, naive = errors(tmp_path, model(tmp_path, dtype=dtype), IN_NORMS)
    assert carried <= 1e-4
    assert naive > 0.2


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("modules", [ESTIMATED, LINEARS])
def test_scales_between_layers_are_estimated(tmp_path: Path, kv_heads: int, modules: list[str]) -> None:
    carried, naive = errors(tmp_path, model(tmp_path, kv_heads=kv_heads), modules)
    assert carried <= 2e-2
    assert naive > 0.2


def test_where_nothing_is_folded_between_layers_nothing_is_estimated(tmp_path: Path) -> None:
    carried, naive = errors(tmp_path, model(tmp_path, folds=SMOOTHED), LINEARS)
    assert carried <= 1e-4
    assert naive > 0.1


def test_a_carried_merge_says_so_and_a_naive_one_warns(tmp_path: Path) -> None:
    made = model(tmp_path)
    adapter(tmp_path / "lora", LINEARS, made.weights)
    said: list[str] = []
    with warnings_to(lambda text: said.append(text) if "basis" in text else None):
        report = loratools.merge(made.base, tmp_path / "lora", tmp_path / "out", original=made.original)
        assert not said
        assert any("is carried from" in note and "14 of its 14 modules" in note for note in report.notes)
        loratools.merge(made.base, tmp_path / "lora", tmp_path / "own", trained_on="folded")
        assert not said
        loratools.merge(made.base, tmp_path / "lora", tmp_path / "naive")
        assert any("another basis" in text and "--original" in text for text in said)
    [entry] = json.loads((tmp_path / "out" / "loratools.json").read_text())["adapters"]
    [plain] = json.loads((tmp_path / "own" / "loratools.json").read_text())["adapters"]
    assert entry["carried_from"] == plain["digest"] != entry["digest"]
    with pytest.raises(IncompatibleAdapter, match="none is given"):
        loratools.merge(made.base, tmp_path / "lora", tmp_path / "no", trained_on="original")


@pytest.mark.parametrize("policy", ["partial", "requantize"])
def test_the_other_policies_take_the_carried_adapter_too(tmp_path: Path, policy: Any) -> None:
    made = model(tmp_path)
    deltas = adapter(tmp_path / "lora", IN_NORMS, made.weights, size=0.1)
    loratools.merge(made.base, tmp_path / "lora", tmp_path / "out", original=made.original, quantized=policy)
    loratools.dequantize(tmp_path / "out", tmp_path / "plain", verify=False)
    before = logits(made.original, made.unfolded)
    effect = logits(made.original, {name: W + deltas.get(name, 0) for name, W in made.unfolded.items()}) - before
    moved = logits(tmp_path / "plain") - before
    kept = float((moved * effect).sum() / effect.square().sum())
    assert kept == pytest.approx(1, abs=0.02 if policy == "partial" else 0.3)


def test_another_model_is_not_the_original(tmp_path: Path) -> None:
    made = model(tmp_path)
    adapter(tmp_path / "lora", LINEARS, made.weights)
    torch.manual_seed(99)
    other = {name: torch.randn_like(weight) if weight.ndim == 2 else weight for name, weight in made.weights.items()}
    (tmp_path / "other").mkdir()
    folded_models.save_file(other, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text((made.original / "config.json").read_text())
    with pytest.raises(WrongBase, match="is not the model that was folded"):
        loratools.merge(made.base, tmp_path / "lora", tmp_path / "out", original=tmp_path / "other")
