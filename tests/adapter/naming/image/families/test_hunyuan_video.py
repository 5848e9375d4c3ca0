"""HunyuanVideo: diffusers' converters move every row where the family's data say; ComfyUI's names lead to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loratools.adapter.naming.image.families import hunyuan_video_comfy
from loratools.adapter.naming.image.families.hunyuan_video import FAMILY
from tests.make.image_families import TARGETS, lora, model_of, originals, prove, rows, shapes_of

diffusers = pytest.importorskip("diffusers")

WIDE = {
    "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "num_single_layers": 2, "text_embed_dim": 12, "pooled_projection_dim": 6,
}  # fmt: skip
"""Tiny but for the width, 3072, which diffusers' converters hold for given."""


def _model(name: str = "HunyuanVideoTransformer3DModel", **config: Any) -> nn.Module:
    return model_of(getattr(diffusers, name), **WIDE, **config)


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers as convert

    prove(FAMILY, _model(), convert)


def test_framepack_has_the_same_modules_and_more_embedders() -> None:
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers as convert

    model = _model(
        "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True
    )
    prove(FAMILY, model, convert)


def test_diffusers_makes_of_a_lora_what_the_rows_say() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers as convert

    shapes = shapes_of(_model(), TARGETS)
    tensors = lora(originals(FAMILY, shapes), rank=3)
    theirs = convert(dict(tensors))
    for module, (original, order) in rows(FAMILY, shapes).items():
        if "refiner" in module and module.endswith(("to_q", "to_k", "to_v")):
            continue  # diffusers cuts their A in three too, so its factors do not fit each other
        up, down = (theirs[f"transformer.{module}.lora_{factor}.weight"] for factor in "BA")
        assert torch.equal(up, tensors[f"diffusion_model.{original}.lora_B.weight"][order]), module
        if original not in FAMILY.swapped:  # diffusers swaps the halves of A too, and the ranks no longer meet
            assert torch.equal(down, tensors[f"diffusion_model.{original}.lora_A.weight"]), module


def _process_unet_state_dict(key: str) -> str:
    """Return ComfyUI's name of a tensor of Tencent's: the replacements of its `process_unet_state_dict`."""
    for old, new in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."), ("_attn_qkv.", "_attn.qkv."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"), ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
        (".q_norm.weight", ".norm.query_norm.weight"), (".k_norm.weight", ".norm.key_norm.weight"),
        ("_attn_proj.", "_attn.proj."), (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."), ("_in.mlp.0.", "_in.in_layer."),
    ):  # fmt: skip
        key = key.replace(old, new)
    return key


def test_comfys_names_are_those_that_it_gives_the_modules_as_it_loads_them() -> None:
    shapes = shapes_of(_model())
    comfy = rows(hunyuan_video_comfy.FAMILY, shapes)
    for module, (original, order) in rows(FAMILY, shapes).items():
        renamed = _process_unet_state_dict(f"{original}.weight")
        assert comfy[module] == (renamed.removesuffix(".weight"), order)
