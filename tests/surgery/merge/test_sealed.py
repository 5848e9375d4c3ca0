"""An adapter's seal on a base in other hands: its codes, the numbers that they stand for, and neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import dialects
from loratools.errors import WrongBase
from tests.make import fp8, tiny

Q = "model.layers.0.self_attn.q_proj"
PARTS = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in FP8, what it stands for in BF16, the model it was made from, and an adapter sealed with each."""
    folder = tmp_path_factory.mktemp("models")
    weights = tiny.llama_weights()
    fp8.save_llama(folder / "codes", weights)
    loratools.dequantize(folder / "codes", folder / "numbers")
    tiny.save_llama(folder / "parent", weights)
    tiny.save_peft(folder / "adapter", tiny.lora_factors())
    for base in ("codes", "numbers", "parent"):
        loratools.convert(folder / "adapter", folder / f"of-{base}", base=folder / base)
    return folder


def test_a_seal_of_codes_has_the_digests_of_all_parts_and_of_the_numbers(models: Path) -> None:
    base = dialects.open_adapter(models / "of-codes").base
    assert base is not None
    stored, numbers = loratools.hash(models / "codes"), loratools.hash(models / "numbers")
    names = {f"{path}.{part}" for path in PARTS for part in ("weight", "weight_scale_inv")}
    assert base.tensors == {name: stored.tensors[name] for name in names}
    assert base.weights == {f"{path}.weight": numbers.tensors[f"{path}.weight"] for path in PARTS}
    assert (base.schema, base.root, base.logical) == (stored.schema, stored.root, numbers.root)


@pytest.mark.parametrize(
    ("sealed", "base"), [("codes", "codes"), ("codes", "numbers"), ("numbers", "codes"), ("numbers", "numbers")]
)
def test_codes_and_their_numbers_are_one_base(sealed: str, base: str, models: Path, tmp_path: Path) -> None:
    report = loratools.merge(models / base, models / f"of-{sealed}", tmp_path / "out")
    assert report.verified == 4
    assert loratools.validate(models / f"of-{sealed}", models / base).differences == ()


@pytest.mark.parametrize("policy", ["partial", "requantize"])
def test_every_policy_compares(policy: Any, models: Path, tmp_path: Path) -> None:
    for sealed in ("codes", "numbers"):
        report = loratools.merge(
            models / "codes", models / f"of-{sealed}", tmp_path / sealed, quantized=policy, force=True
        )
        assert report.verified == 4
    with pytest.raises(WrongBase, match="this base is a quantized copy"):
        loratools.merge(models / "codes", models / "of-parent", tmp_path / "out", quantized=policy, force=True)
    assert not (tmp_path / "out").exists()


def test_a_quantized_copy_of_another_model_is_refused_as_such(models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WrongBase, match=r"(?s)this base is a quantized copy \(FP8 with scales, FP8 E4M3.*check-base warn"
    ):
        loratools.merge(models / "codes", models / "of-parent", tmp_path / "out")
    report = loratools.merge(models / "codes", models / "of-parent", tmp_path / "out", check_base="warn")
    assert report.verified == 0
    assert any("quantized copy" in warning for warning in report.warnings)
    found = loratools.validate(models / "of-parent", models / "codes").differences
    assert found is not None
    assert "this base is a quantized copy (FP8 with scales" in found[0]
    with pytest.raises(WrongBase, match="not that of the base"):
        loratools.merge(models / "parent", models / "of-codes", tmp_path / "other")


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_another_code_or_scale_is_another_base(part: str, models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "codes" / "model.safetensors")
    tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"].clone()
    raw = tensors[f"{Q}.{part}"].view(torch.uint8).view(-1)
    raw[-2] ^= 4
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_bytes((models / "codes" / "config.json").read_bytes())
    for sealed in ("codes", "numbers"):
        with pytest.raises(WrongBase, match=Q):
            loratools.merge(tmp_path / "base", models / f"of-{sealed}", tmp_path / "out")
        found = loratools.validate(models / f"of-{sealed}", tmp_path / "base").differences
        assert found
        assert any(Q in sentence for sentence in found)


def test_adapters_of_codes_and_of_their_numbers_are_combined(models: Path, tmp_path: Path) -> None:
    report = loratools.combine([models / "of-codes", models / "of-numbers"], tmp_path / "both")
    assert not report.warnings
    with pytest.raises(WrongBase):
        loratools.combine([models / "of-codes", models / "of-parent"], tmp_path / "neither")
