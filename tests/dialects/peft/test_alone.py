"""PEFT's names without a config: at scale 1, which is said, or by the alpha of the header or the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.decisions import warnings_to
from loratools.errors import BadFile

LLAMA = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
WAN = [f"blocks.{i}.self_attn.q" for i in range(2)]
RANK, SIZE = 4, 32
UNSAID = "; 1 is applied, as loaders do"


def write(
    path: Path, modules: list[str], name: str = "{}.lora_{}.weight", metadata: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    file = {}
    for module in modules:
        file[name.format(module, "A")] = torch.randn(RANK, SIZE, generator=generator)
        file[name.format(module, "B")] = torch.randn(SIZE, RANK, generator=generator)
    save_file(file, path, metadata=dict(metadata or {}))
    return file


def opened(path: Path, alpha: float | None = None) -> tuple[Adapter, list[str]]:
    warnings: list[str] = []
    with warnings_to(warnings.append):
        return dialects.open_adapter(path, alpha=alpha), warnings


@pytest.mark.parametrize("modules", [LLAMA, WAN], ids=["llama", "wan"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "module.base_model.model."])
@pytest.mark.parametrize("name", ["{}.lora_{}.weight", "{}.lora_{}.default.weight"])
def test_names_without_a_config_merge_at_scale_one(tmp_path: Path, modules: list[str], prefix: str, name: str) -> None:
    file = write(tmp_path / "a.safetensors", [prefix + module for module in modules], name)
    W = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    save_file({f"{module}.weight": W.clone() for module in modules}, tmp_path / "base.safetensors")
    adapter, warnings = opened(tmp_path / "a.safetensors")
    assert {update.scaling for update in adapter.updates.values()} == {1.0}
    assert any(text.endswith(UNSAID) for text in warnings)
    loratools.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out")
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for module in modules:
        A, B = (file[name.format(prefix + module, side)].double() for side in "AB")
        torch.testing.assert_close(merged[f"{module}.weight"].double(), W + B @ A, rtol=1e-5, atol=1e-5)


CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "r": RANK, "target_modules": ["q_proj", "q"]}
HEADERS = {
    "lora_alpha": {"lora_alpha": "8"}, "alpha": {"alpha": "8"}, "ss_network_alpha": {"ss_network_alpha": "8.0"},
    "a config": {"config": json.dumps({"lora_alpha": 8, "r": RANK})}, "PEFT's": {"adapter_config": json.dumps(CONFIG)},
    "rsLoRA": {"lora_config": json.dumps({"lora_alpha": 4, "use_rslora": True})},
    "diffusers'": {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "r": RANK, "peft_type": "LORA"})},
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusion_model.", "transformer.", "unet.base_model.model."])
def test_an_alpha_of_the_header_is_taken_and_the_users_wins(tmp_path: Path, prefix: str, header: str) -> None:
    write(tmp_path / "a.safetensors", [prefix + module for module in WAN], metadata=HEADERS[header])
    adapter, warnings = opened(tmp_path / "a.safetensors")
    assert {update.scaling for update in adapter.updates.values()} == {2.0}
    assert not any(text.endswith(UNSAID) for text in warnings)
    adapter, _ = opened(tmp_path / "a.safetensors", alpha=2.0)
    assert {update.alpha for update in adapter.updates.values()} == {2.0}


@pytest.mark.parametrize("prefix", ["dit.", "pipe.dit."])
def test_diffsynth_names_its_model_dit(tmp_path: Path, prefix: str) -> None:
    write(tmp_path / "a.safetensors", [prefix + module for module in WAN], "{}.lora_{}.default.weight")
    adapter, _ = opened(tmp_path / "a.safetensors")
    assert sorted(adapter.updates) == [f"diffusion_model.{module}" for module in WAN]


def test_mochis_own_factors_are_parameters(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", [f"blocks.{i}.attn.qkv_x" for i in range(2)], "{}.lora_{}")
    adapter, _ = opened(tmp_path / "a.safetensors")
    assert (adapter.dialect, sorted(adapter.updates)[0]) == ("comfy", "diffusion_model.blocks.0.attn.qkv_x")


def test_a_folder_without_its_config_is_refused_unless_the_alpha_is_given(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", [f"base_model.model.{module}" for module in LLAMA])
    with pytest.raises(BadFile, match="without it the scaling is unknown"):
        dialects.open_adapter(tmp_path)
    adapter, _ = opened(tmp_path, alpha=8.0)
    assert {update.scaling for update in adapter.updates.values()} == {2.0}
