"""What a merge measures is counted once for each tensor, and each part of it that was lost is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from tests.make.fp8 import decoded
from tests.storage.codecs.test_fp8 import K, Q
from tests.surgery.merge.test_quantized import kept, models


def two_changes(folder: Path, of_q: float, of_k: float) -> dict[str, torch.Tensor]:
    """Write the models of `test_quantized`, and an adapter of both modules; return ΔW of each in float64."""
    models(folder)
    one = load_file(folder / "lora" / "adapter_model.safetensors")
    both = {
        name.replace(Q, path): tensor * size if "lora_B" in name else tensor.clone()
        for name, tensor in one.items()
        for path, size in ((Q, of_q), (K, of_k))
    }
    save_file(both, folder / "lora" / "adapter_model.safetensors")
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    config["target_modules"] = [path.rpartition(".")[2] for path in (Q, K)]
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    start = "base_model.model."
    return {
        path: 2 * (both[f"{start}{path}.lora_B.weight"].double() @ both[f"{start}{path}.lora_A.weight"].double())
        for path in (Q, K)
    }


def scales_apart(folder: Path) -> None:
    """Put the scale of Q into another file than its codes."""
    tensors = load_file(folder / "model.safetensors")
    last = f"{Q}.weight_scale_inv"
    files = {"model-00001-of-00002.safetensors": tensors.keys() - {last}, "model-00002-of-00002.safetensors": {last}}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("resume", [False, True])
def test_codes_whose_scales_lie_in_another_file_count_once(tmp_path: Path, resume: bool) -> None:
    deltas = two_changes(tmp_path, 0.3, 0.004)
    whole = load_file(tmp_path / "base" / "model.safetensors")
    scales_apart(tmp_path / "base")
    seal = tmp_path / "sealed"
    loratools.convert(tmp_path / "lora", seal, base=tmp_path / "base")
    report = loratools.merge(tmp_path / "base", seal, tmp_path / "out", quantized="requantize", resume=resume)
    merged: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        merged |= load_file(file)
    changes = {path: decoded(merged, path) - decoded(whole, path) for path in deltas}
    survived = sum(float((changes[path] * deltas[path]).sum()) for path in deltas)
    total = sum(float(deltas[path].square().sum()) for path in deltas)
    assert report.retention == pytest.approx(survived / total, abs=1e-6)
    assert report.recoded == pytest.approx(
        {f"{path}.weight": kept(decoded(merged, path), decoded(whole, path), deltas[path]) for path in deltas}, abs=1e-4
    )
    assert report.verified == 2


def test_a_module_whose_change_is_erased_is_said_though_all_together_survive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_changes(tmp_path, 0.3, 2e-4)
    with caplog.at_level(logging.WARNING):
        report = loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize")
    assert report.retention is not None
    assert report.retention > 0.9
    assert report.recoded[f"{K}.weight"] < 0.5
    assert f"in 1 of 2 modules, least in {K}.weight" in caplog.text


def test_what_rounding_loses_of_plain_tensors_is_said_beside_codes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_changes(tmp_path, 0.3, 2e-5)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    plain = decoded(tensors, K).bfloat16()
    del tensors[f"{K}.weight_scale_inv"]
    save_file({**tensors, f"{K}.weight": plain}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        loratools.merge(
            tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="requantize", retention="full"
        )
    assert "of the change of what is no codes survives rounding" in caplog.text


def test_tensors_are_counted_as_the_model_has_them(tmp_path: Path) -> None:
    two_changes(tmp_path, 0.3, 0.3)
    prepared = loratools.surgery.merge.prepare(
        tmp_path / "base", tmp_path / "lora", tmp_path / "out",
        options=loratools.surgery.merge.MergeOptions(quantized="requantize"),
    )  # fmt: skip
    assert prepared.plan.to_json(1)["tensors"] == {"total": 2, "changed": 2, "cast": 0}
