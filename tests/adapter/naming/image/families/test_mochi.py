"""Mochi 1: diffusers' converter moves every row where the family's data say; Genmo's own adapters are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.adapter.naming.image.families.mochi import FAMILY
from loratools.decisions import warnings_to
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers as convert

    prove(FAMILY, build("mochi"), convert, also={"pos_frequencies": torch.zeros(3, 2, 4)})


def _genmo(path: Path, kwargs: str | None) -> dict[str, torch.Tensor]:
    """Write an adapter as Genmo's trainer does: factors without `.weight`, alphas in the header."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv_x": (48, 16), "qkv_y": (48, 12), "proj_x": (16, 16), "proj_y": (12, 16)}
    tensors = {}
    for block in (0, 46):
        for name, (out, width) in shapes.items():
            tensors[f"blocks.{block}.attn.{name}.lora_A"] = torch.randn(2, width, generator=generator)
            tensors[f"blocks.{block}.attn.{name}.lora_B"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, path, None if kwargs is None else {"kwargs": kwargs})
    return tensors


def test_genmos_own_adapters_are_read_with_the_alphas_of_their_header(tmp_path: Path) -> None:
    alphas = {"qkv_proj_lora_rank": 2, "qkv_proj_lora_alpha": 4, "out_proj_lora_rank": 2, "out_proj_lora_alpha": 1}
    tensors = _genmo(tmp_path / "genmo.safetensors", json.dumps(alphas))
    report = loratools.inspect(tmp_path / "genmo.safetensors")
    assert report.dialect == "comfy"
    updates = loratools.open_adapter(tmp_path / "genmo.safetensors").updates
    assert len(updates) == 8
    for module, update in updates.items():
        name = module.removeprefix("diffusion_model.")
        scaling = 2.0 if "qkv" in name else 0.5
        product = scaling * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        torch.testing.assert_close(update.delta_weight(), product, rtol=0, atol=1e-5, msg=module)
    loratools.convert(tmp_path / "genmo.safetensors", tmp_path / "diffusers", to="diffusers")
    assert (
        "transformer.transformer_blocks.46.attn1.add_k_proj" in loratools.open_adapter(tmp_path / "diffusers").updates
    )


@pytest.mark.parametrize("kwargs", [None, "{", "[]", "{}"])
def test_without_alphas_1_is_applied_and_said(kwargs: str | None, tmp_path: Path) -> None:
    _genmo(tmp_path / "genmo.safetensors", kwargs)
    said: list[str] = []
    with warnings_to(said.append):
        updates = loratools.open_adapter(tmp_path / "genmo.safetensors").updates
    assert {update.scaling for update in updates.values()} == {1.0}
    assert any("records no scale" in sentence for sentence in said)
