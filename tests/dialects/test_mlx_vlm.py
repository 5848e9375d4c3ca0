"""MLX-VLM's own files: factors A (in, r) and B (r, out), and an alpha that is the scaling, by its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import dialects
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.surgery.models import load, random

Q = "language_model.model.layers.0.self_attn.q_proj"
UP = "language_model.model.layers.1.mlp.up_proj"
SIDES = {Q: (8, 12), UP: (20, 12)}


def adapter(folder: Path, config: dict[str, Any] | None = None, **more: Tensor) -> dict[str, Tensor]:
    """Write an adapter of rank 3; return ΔW = alpha·(A·B)ᵀ for alpha 0.1."""
    folder.mkdir()
    tensors, deltas = dict(more), {}
    for i, (module, (out, inner)) in enumerate(SIDES.items()):
        A, B = random(inner, 3, seed=i), random(3, out, seed=i + 9)
        tensors |= {f"{module}.A": A, f"{module}.B": B}
        deltas[module] = 0.1 * (A.double() @ B.double()).T
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    config = {"rank": 3, "alpha": 0.1, "dropout": 0.1} if config is None else config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def test_its_alpha_is_the_scaling(tmp_path: Path) -> None:
    deltas = adapter(tmp_path / "lora")
    opened = dialects.open_adapter(tmp_path / "lora")
    assert opened.dialect == "mlx_vlm"
    assert opened.updates.keys() == deltas.keys()
    for module, update in opened.updates.items():
        assert torch.allclose(update.delta_weight().double(), deltas[module], atol=1e-6)
    single = dialects.open_adapter(tmp_path / "lora" / "adapters.safetensors")
    assert [update.scaling for update in single.updates.values()] == [0.1, 0.1]


def test_merged_into_a_base_of_either_naming_and_converted(tmp_path: Path) -> None:
    deltas = adapter(tmp_path / "lora")
    before = {module: random(*shape, seed=30 + i) for i, (module, shape) in enumerate(SIDES.items())}
    convert(tmp_path / "lora", tmp_path / "peft", to="peft")
    for name, prefix in (("mlx", "language_model.model."), ("transformers", "model.language_model.")):
        names = {module: module.replace("language_model.model.", prefix) + ".weight" for module in before}
        (tmp_path / name).mkdir()
        save_file({names[module]: W for module, W in before.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
        for source in ("lora", "peft"):
            merge(tmp_path / name, tmp_path / source, tmp_path / f"{name}-{source}")
            found = load(tmp_path / f"{name}-{source}")
            for module, W in before.items():
                assert torch.allclose(found[names[module]].double(), W.double() + deltas[module], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"rank": 3}, UnsupportedAdapter, "no alpha"),
        ({"rank": 3, "alpha": "one"}, BadFile, "alpha: expected a number"),
        ({"rank": 4, "alpha": 0.1}, BadFile, "its tensors have rank 3, the config says 4"),
    ],
)
def test_what_the_config_lacks_or_contradicts_is_said(
    config: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    adapter(tmp_path / "lora", config)
    with pytest.raises(error) as refusal:
        dialects.open_adapter(tmp_path / "lora")
    assert says in str(refusal.value)


def test_tensors_trained_whole_are_named(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", **{"vision_tower.patch_embed.proj.weight": random(2, 2)})
    with pytest.raises(UnsupportedAdapter, match=r"patch_embed\.proj\.weight: trained whole"):
        dialects.open_adapter(tmp_path / "lora")


def test_an_alpha_of_the_user_is_divided_by_the_rank(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", {})
    opened = dialects.open_adapter(tmp_path / "lora", alpha=6)
    assert {update.scaling for update in opened.updates.values()} == {2.0}
