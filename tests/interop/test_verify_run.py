"""`verify --run`: for every family a merged model runs as the base with PEFT's adapter; a wrong merge does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify
from tests.interop.models import FAMILIES, adapt

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def folders(name: str, tmp_path: Path, dtype: torch.dtype) -> tuple[Any, Path, Path]:
    """Return the model of a family in a dtype, and its folder and that of an adapter on it."""
    model = FAMILIES[name].build().to(dtype)
    model.save_pretrained(tmp_path / "base")
    adapt(copy.deepcopy(model).float(), list(FAMILIES[name].targets)).save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_runs_as_its_merge_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, base, adapter = folders(name, tmp_path, torch.float32)
    merge(base, adapter, tmp_path / "merged")
    proof = verify(tmp_path / "merged", base, adapter, run=True, seed=1)
    assert proof.run is not None
    assert proof.run.applied_by.startswith("PEFT")
    assert proof.ok
    assert proof.run.tells
    assert proof.run.distance < 1e-3 * proof.run.effect


def test_a_bf16_merge_is_within_the_noise_of_rounding_and_weights_are_applied_live(tmp_path: Path) -> None:
    _, base, adapter = folders("llama", tmp_path, torch.bfloat16)
    merge(base, [adapter, adapter], tmp_path / "merged", weights=[2.0, -0.5])
    proof = verify(tmp_path / "merged", base, [adapter, adapter], weights=[2.0, -0.5], run=True, seed=1)
    assert proof.run is not None
    assert proof.run.applied_by == "loratools.live"
    assert proof.ok
    assert proof.run.noise > 0
    weak = verify(tmp_path / "merged", base, [adapter, adapter], weights=[2.0, -1.5], run=True, seed=1)
    assert weak.run is not None
    assert not weak.run.ok
    assert not weak.ok


@pytest.mark.parametrize("name", ["llama", "gpt2-square"])
def test_another_scaling_is_seen(name: str, tmp_path: Path) -> None:
    import json

    _, base, adapter = folders(name, tmp_path, torch.float32)
    sealed = tmp_path / "sealed"
    convert(adapter, sealed)
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["lora_alpha"] *= 2
    config.write_text(json.dumps(fields))
    merge(base, adapter, tmp_path / "merged")
    proof = verify(tmp_path / "merged", base, sealed, run=True, seed=1)
    assert proof.run is not None
    assert not proof.run.ok
    assert proof.run.distance > 0.3 * proof.run.effect
