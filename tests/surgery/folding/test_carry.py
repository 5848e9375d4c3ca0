"""An adapter of the original, carried into a folded AWQ base: judged by logits, beside the naive merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


def test_smoothquant_is_folded_by_its_recipe_or_by_its_norms(tmp_path: Path) -> None:
    made = folded_models.smoothquant(tmp_path, llama(tmp_path / "original"))
    carried, naive = errors(tmp_path, made, LINEARS)
    assert carried <= 1e-4
    assert naive > 0.1
    (made.base / "recipe.yaml").unlink()
    first = (tmp_path / "out" / "model.safetensors").stat().st_size
    loratools.merge(made.base, tmp_path / "lora", tmp_path / "again", dtype="f32", original=made.original)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == first
    [entry] = json.loads((tmp_path / "again" / "loratools.json").read_text())["adapters"]
    assert "carried_from" in entry


def test_norms_of_one_plus_w(tmp_path: Path) -> None:
    weights = llama(tmp_path / "original", family="Gemma")
    carried, naive = errors(tmp_path, awq(tmp_path, weights, shift=1.0), IN_NORMS)
    assert carried <= 1e-4
    assert naive > 0.1


def test_norms_of_one_plus_w_that_were_divided_as_w_are_refused(tmp_path: Path) -> None:
    made = awq(tmp_path, llama(tmp_path / "original", family="Gemma"))
    adapter(tmp_path / "lora", IN_NORMS, made.weights)
    with pytest.raises(WrongBase, match=r"1 \+ w|no scale that is folded"):
        loratools.merge(made.base, tmp_path / "lora", tmp_path / "out", original=made.original)


def test_dora_gets_magnitudes_of_the_folded_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    made = model(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(made.original, dtype=torch.float64)
    plain.load_state_dict(made.unfolded)
    before = logits(made.original, made.unfolded)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "gate_proj"])
    tuned = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) * 0.2 + 0.9)
    tuned.save_pretrained(tmp_path / "lora")
    wanted = tuned.eval()(folded_models.tokens()).logits.detach()
    loratools.merge(made.base, tmp_path / "lora", tmp_path / "out", dtype="f32", original=made.original)
    assert float((logits(tmp_path / "out") - wanted).norm() / (wanted - before).norm()) <= 1e-4


def test_scales_of_an_activation_are_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)
    s = torch.exp(0.35 * torch.randn(64, generator=generator))
    start = "gpt_neox.layers.0.mlp"
    (tmp_path / "original").mkdir()
    (tmp_path / "base").mkdir()
    weights = {f"{start}.dense_h_to_4h.weight": inner.half(), f"{start}.dense_4h_to_h.weight": outer.half()}
    folded_models.save_file(weights, tmp_path / "original" / "model.safetensors")
    stored = {f"{start}.act.scales": s.half()}
    numbers = {}
    for name, W in weights.items():
        scaled = W.double() * (s.half().double() if "4h_to_h" in name else 1)
        parts, numbers[name] = folded_models.quantize(scaled)
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    folded_models.save_file(stored, tmp_path / "base" / "model.safetensors")
    config: dict[str, Any] = {"model_type": "gpt_neox", "torch_dtype": "float16"}
    (tmp_path / "original" / "config.json").write_text(json.dumps(config))
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    path = f"{start}.dense_4h_to_h"
    A, B = torch.randn(4, 64, generator=generator), torch.randn(32, 4, generator=generator)
    tensors = {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
    (tmp_path / "lora").mkdir()
    folded_models.save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["dense_4h_to_h"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(written))
    options: Any = {"original": tmp_path / "original", "quantized": "partial"}
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", **options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = numbers[f"{path}.weight"] + 2 * (B.double() @ A.double()) * s.half().double()
    torch.testing.assert_close(found[f"{path}.weight"].double(), wanted, rtol=2**-11, atol=1e-6)
    assert torch.equal(found[f"{start}.act.scales"], stored[f"{start}.act.scales"])
    with pytest.raises(IncompatibleAdapter, match=r"act\.scales.*no class of a model in 16 bit"):
        loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "no", original=tmp_path / "original")
