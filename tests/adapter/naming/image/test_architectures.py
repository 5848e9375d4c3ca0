"""The lists of known architectures: no collisions, nothing missing, and every name found again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from loratools.adapter.naming.image import architectures
from loratools.dialects.kohya.names import dotted, flattened
from tests.dialects.test_unflatten import SDXL

PREFIXES = {"unet": "lora_unet_", "transformer": "lora_transformer_", "diffusion_model": "lora_unet_"}


def test_there_are_at_least_six_image_architectures() -> None:
    families = {name.removesuffix("-original") for name in architectures.names()} - {"clip", "t5"}
    assert families >= {"sd", "sd3", "flux", "qwen-image", "wan", "hunyuan-video", "z-image", "lumina2"}


@pytest.mark.parametrize("name", architectures.names())
def test_no_two_names_become_one_and_each_is_found_again(name: str) -> None:
    one = architectures.get(name)
    modules = [f"{one.component}.{module}" for module in one.by_flat.values()]
    flat, unknown = flattened(modules)
    assert (len(flat), unknown) == (len(modules), {})
    assert len(set(flat.values())) == len(modules)


def test_flat_names_that_two_architectures_share_are_never_silently_one_of_them() -> None:
    """Every flat name of every list, alone: it is found as one module, or refused."""
    lists = [architectures.get(name) for name in architectures.names() if name not in ("clip", "t5")]
    readings: dict[str, set[str]] = {}
    for one in lists:
        for flat, module in one.by_flat.items():
            readings.setdefault(flat, set()).add(f"{one.component}.{module}")
    shared = {flat for flat, modules in readings.items() if len(modules) > 1}
    assert "double_blocks_0_img_attn_qkv" in shared
    for flat in sorted(shared)[::7]:
        _, faults = dotted([("lora_unet_", flat)], {}, None)
        assert len(faults) == 1
        assert "could be" in faults[0]


def test_a_pattern_that_collides_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a\.b and a_b both become a_b"):
        architectures.flatten(["a.b", "a_b"])


def linear(model: Any) -> set[str]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_the_lists_hold_every_layer_of_the_real_models() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = {
            "sd": linear(diffusers.UNet2DConditionModel(cross_attention_dim=768))
            | linear(diffusers.UNet2DConditionModel(**SDXL)),
            "flux": linear(diffusers.FluxTransformer2DModel(guidance_embeds=True)),
            "sd3": linear(diffusers.SD3Transformer2DModel(num_layers=24, dual_attention_layers=tuple(range(13)))),
            "qwen-image": linear(diffusers.QwenImageTransformer2DModel()),
            "wan": linear(diffusers.WanTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120)),
            "hunyuan-video": linear(diffusers.HunyuanVideoTransformer3DModel()),
            "lumina2": linear(diffusers.Lumina2Transformer2DModel()),
            "z-image": {name for name in linear(diffusers.ZImageTransformer2DModel()) if not name.startswith("all_")},
            "clip": {f"text_model.{name}" for name in linear(CLIPTextModel(CLIPTextConfig(num_hidden_layers=32)))},
            "t5": linear(T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))),
        }
    for name, modules in real.items():
        assert len(modules) > 100
        assert modules <= set(architectures.get(name).by_flat.values()), name
