"""Merges that make codes again: own scales, an original, at random; what survives is measured, said, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import IncompatibleAdapter, WrongBase
from tests.make.fp8 import STATED, blocks, decoded
from tests.storage.codecs.recode import K, Q, saved_lora


def models(folder: Path, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Write an original in bf16, its FP8 base, and an adapter of `size`; return the original's weights in float64."""
    generator = torch.Generator().manual_seed(8)
    weights = {path: (torch.randn(300, 200, generator=generator) / 20).bfloat16() for path in (Q, K)}
    (folder / "original").mkdir()
    (folder / "base").mkdir()
    save_file({f"{path}.weight": W for path, W in weights.items()}, folder / "original" / "model.safetensors")
    tensors = {}
    for path, W in weights.items():
        tensors[f"{path}.weight"], tensors[f"{path}.weight_scale_inv"] = blocks(W.float())
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16"}
    (folder / "original" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": STATED}))
    delta = saved_lora(folder / "lora", Q, (300, 200))
    scaled = load_file(folder / "lora" / "adapter_model.safetensors")
    scaled = {name: tensor * size if "lora_B" in name else tensor for name, tensor in scaled.items()}
    save_file(scaled, folder / "lora" / "adapter_model.safetensors")
    return {path: W.double() for path, W in weights.items()} | {"delta": delta * size}


def kept(after: torch.Tensor, before: torch.Tensor, delta: torch.Tensor) -> float:
    return float(((after - before) * delta).sum() / delta.square().sum())


@pytest.mark.parametrize(("original", "rounding"), [(False, "nearest"), (True, "nearest"), (False, "stochastic")])
def test_codes_are_made_again_and_what_survives_is_measured(tmp_path: Path, original: bool, rounding: str) -> None:
    weights = models(tmp_path, 0.3)
    report = loratools.merge(
        tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize",
        original=tmp_path / "original" if original else None, rounding=rounding,
    )  # fmt: skip
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert merged.keys() == base.keys()
    for name in (f"{K}.weight", f"{K}.weight_scale_inv"):
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8))
    before = weights[Q] if original else decoded(base, Q)
    share = kept(decoded(merged, Q), before, weights["delta"])
    assert report.recoded == pytest.approx({f"{Q}.weight": share}, abs=1e-3)
    assert 0.9 < share < 1.1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == STATED
    if original:
        codes, scale = blocks((weights[Q] + weights["delta"]).float())
        torch.testing.assert_close(merged[f"{Q}.weight_scale_inv"], scale, rtol=1e-6, atol=0)
        assert (merged[f"{Q}.weight"].float() != codes.float()).double().mean() < 1e-3


def test_a_change_that_codes_erase_is_refused_and_written_by_force(tmp_path: Path) -> None:
    weights = models(tmp_path, 2e-4)
    with pytest.raises(IncompatibleAdapter, match=r"only .*% of the change survives as codes"):
        loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize")
    assert not (tmp_path / "out").exists()
    report = loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize", force=True)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    share = kept(decoded(merged, Q), decoded(base, Q), weights["delta"])
    assert report.recoded[f"{Q}.weight"] == pytest.approx(share, abs=1e-3)
    assert share < 0.5


def test_another_model_is_no_original(tmp_path: Path) -> None:
    models(tmp_path)
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()},
              tmp_path / "original" / "model.safetensors")  # fmt: skip
    with pytest.raises(WrongBase, match="is not the unquantized original of this base"):
        loratools.merge(
            tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize",
            original=tmp_path / "original",
        )  # fmt: skip


@pytest.mark.parametrize("policy", ["requantize", "dequantize", "partial"])
def test_a_residual_brings_every_byte_of_the_codes_back(tmp_path: Path, policy: str) -> None:
    models(tmp_path, 0.3)
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized=policy, keep_residual=True)
    report = loratools.unmerge(tmp_path / "out", tmp_path / "lora", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())
    assert report.proved == "root hash"


@pytest.mark.parametrize("policy", ["requantize", "dequantize", "partial"])
@pytest.mark.parametrize("fault", [None, "untouched", "touched", "config"])
def test_verify_judges_what_became_of_codes(tmp_path: Path, policy: str, fault: str | None) -> None:
    models(tmp_path, 0.3)
    out = tmp_path / "out"
    loratools.merge(tmp_path / "base", tmp_path / "lora", out, quantized=policy)
    tensors = load_file(out / "model.safetensors")
    if fault in ("untouched", "touched"):
        tensor = tensors[f"{K if fault == 'untouched' else Q}.weight"].view(torch.uint8)
        tensor.view(-1)[1 : 400 if fault == "touched" else 2] ^= 0x44
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if fault == "config":
        config = json.loads((out / "config.json").read_text())
        stated = config.get("quantization_config", STATED)
        config["quantization_config"] = stated | {"modules_to_not_convert": ["nothing"]}
        (out / "config.json").write_text(json.dumps(config))
    assert loratools.verify(out, tmp_path / "base", tmp_path / "lora").ok == (fault is None)


def test_what_codes_lose_is_kept_as_an_adapter(tmp_path: Path) -> None:
    weights = models(tmp_path, 0.3)
    out = tmp_path / "out"
    report = loratools.merge(tmp_path / "base", tmp_path / "lora", out, quantized="requantize", keep_loss=200)
    wanted = decoded(load_file(tmp_path / "base" / "model.safetensors"), Q) + weights["delta"]
    lost = wanted - decoded(load_file(out / "model.safetensors"), Q)
    update = loratools.open_adapter(out / "loss").updates[Q]
    given = update.scaling * update.B.load().double() @ update.A.load().double()
    share = float(1 - (lost - given).square().sum() / lost.square().sum())
    assert report.loss_share == pytest.approx(share, abs=1e-4)
    assert share > 0.999  # of full rank
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "less", quantized="requantize", keep_loss=8)
    less = loratools.open_adapter(tmp_path / "less" / "loss").updates[Q]
    best = torch.linalg.svdvals(lost)[8:].square().sum() / lost.square().sum()
    given = less.scaling * less.B.load().double() @ less.A.load().double()
    assert float((lost - given).square().sum() / lost.square().sum()) == pytest.approx(float(best), rel=1e-3)


def test_codes_are_not_subtracted_from(tmp_path: Path) -> None:
    models(tmp_path, 0.3)
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize")
    with pytest.raises(IncompatibleAdapter, match="are codes again") as refusal:
        loratools.unmerge(tmp_path / "out", tmp_path / "lora", tmp_path / "back")
    assert "--keep-residual" in str(refusal.value.hint)
    assert loratools.unmerge(tmp_path / "out", tmp_path / "lora", tmp_path / "back", base=tmp_path / "base").proved


def test_what_codes_lose_of_an_embedding_is_kept_as_one_of_peft(tmp_path: Path) -> None:
    models(tmp_path)
    path = "model.embed_tokens"
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[f"{path}.weight"], tensors[f"{path}.weight_scale_inv"] = blocks(torch.randn(200, 200) / 20)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    start = f"base_model.model.{path}.lora_embedding"
    A, B = torch.randn(3, 200) / 10, torch.randn(200, 3) / 10
    save_file({f"{start}_A": A, f"{start}_B": B}, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    loratools.merge(tmp_path / "base", tmp_path / "lora", out, quantized="requantize", keep_loss=200, tied="both")
    assert loratools.open_adapter(out / "loss").updates[path].kind == "embedding"
    loratools.merge(out, out / "loss", tmp_path / "whole", dtype="f32", tied="both")
    wanted = decoded(tensors, path) + (B.double() @ A.double()).T
    whole = load_file(tmp_path / "whole" / "model.safetensors")[f"{path}.weight"].double()
    assert torch.linalg.vector_norm(whole - wanted) <= 1e-5 * torch.linalg.vector_norm(wanted)


def test_verify_says_that_the_base_itself_is_no_merge(tmp_path: Path) -> None:
    models(tmp_path, 0.02)
    assert not loratools.verify(tmp_path / "base", tmp_path / "base", tmp_path / "lora").ok
    out = tmp_path / "out"
    loratools.merge(tmp_path / "base", tmp_path / "lora", out, quantized="requantize")
    account = loratools.verify(out, tmp_path / "base", tmp_path / "lora")
    assert account.ok
    assert [line for line in account.unseen if "codes" in line]
    assert not [line for line in account.unseen if "F32" in line]


def test_codes_beside_the_changed_ones_may_get_another_scale(tmp_path: Path) -> None:
    """One scale for q, k and v: where q grows beyond it all three have others."""
    models(tmp_path)
    path = "model.layers.0.self_attn.qkv_proj"
    W = torch.randn(600, 200, generator=torch.Generator().manual_seed(1)) / 20
    scale = W.abs().max() / 448
    save_file(
        {f"{path}.weight": (W / scale).to(torch.float8_e4m3fn), f"{path}.weight_scale_inv": scale},
        tmp_path / "base" / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = {"model_type": "phi3", "dtype": "bfloat16", "num_attention_heads": 4, "num_key_value_heads": 4,
              "quantization_config": {"quant_method": "fp8"}}  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    saved_lora(tmp_path / "large", Q, (200, 200))
    loratools.merge(tmp_path / "base", tmp_path / "large", tmp_path / "out", quantized="requantize")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged[f"{path}.weight_scale_inv"] > scale
    assert loratools.verify(tmp_path / "out", tmp_path / "base", tmp_path / "large").ok


@pytest.mark.parametrize("quantized", ["dequantize", "partial"])
def test_config_says_that_modules_are_plain_beside_some_that_stay(tmp_path: Path, quantized: str) -> None:
    """As in DeepSeek V4, whose experts are FP4 in bytes, which no codec reads."""
    models(tmp_path)
    expert = "model.layers.0.mlp.experts.0.w1"
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors |= {f"{expert}.weight": torch.ones(8, 8, dtype=torch.int8), f"{expert}.scale": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    report = loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized=quantized)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    plain = {Q, K} if quantized == "dequantize" else {Q}
    assert set(stated["modules_to_not_convert"]) == {"lm_head", *plain}
    assert {name for name, tensor in merged.items() if tensor.dtype == torch.bfloat16} == {f"{x}.weight" for x in plain}
    assert torch.equal(merged[f"{expert}.weight"], tensors[f"{expert}.weight"])
    left = "module stays as it is stored" if quantized == "dequantize" else "the others stay as they are"
    assert any(left in note for note in report.notes)
    assert loratools.verify(tmp_path / "out", tmp_path / "base", tmp_path / "lora").ok


def test_a_note_names_every_kind_of_codes(tmp_path: Path) -> None:
    models(tmp_path)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[f"{K}.weight_scale_inv"] = torch.tensor(0.01)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (note,) = (n for n in loratools.dequantize(tmp_path / "base", tmp_path / "out").notes if "quantized module" in n)
    assert "1 of FP8 with scales, FP8 E4M3, blocks of 128 × 128" in note
    assert "1 of FP8 with scales, FP8 E4M3, one scale a tensor" in note
    assert note.endswith("in BF16")


@pytest.mark.parametrize(("dtype", "bits"), [("f32", 32), ("f16", 16), (None, 16)])
@pytest.mark.parametrize("quantized", ["dequantize", "partial"])
def test_a_note_names_the_dtype_that_is_written(tmp_path: Path, quantized: Any, dtype: Any, bits: int) -> None:
    models(tmp_path)
    report = loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized=quantized, dtype=dtype)
    (note,) = (note for note in report.notes if "quantized module" in note)
    written = (dtype or "bf16").upper()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(merged[f"{Q}.weight"].dtype)[6:]] == written
    plain = [Q, K] if quantized == "dequantize" else [Q]
    size = sum(merged[f"{module}.weight"].nbytes for module in plain)
    assert f" written in {bits} bit" in note
    assert note.endswith(f", {size / 1e6:.1f} MB in {written}")
