"""Qwen-Image: the names are the model's own, in both namings, and diffusers reads them as they are."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.qwen_image import FAMILY
from tests.make.image_families import TARGETS, lora, model_of, originals, prove, shapes_of

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("layered", [False, True])
def test_all_modules_keep_their_names(layered: bool) -> None:
    prove(FAMILY, model_of(diffusers.QwenImageTransformer2DModel, **TINY, use_additional_t_cond=layered), dict)


@pytest.mark.parametrize(("prefix", "kohya"), [("diffusion_model.", False), ("lora_unet_", True)])
def test_diffusers_reads_a_lora_of_all_of_them_under_the_originals_names(prefix: str, kohya: bool) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers as convert

    shapes = originals(FAMILY, shapes_of(model_of(diffusers.QwenImageTransformer2DModel, **TINY), TARGETS))
    names = {name.rpartition(".lora_")[0] for name in convert(lora(shapes, prefix=prefix, kohya=kohya))}
    assert names == {f"transformer.{module}" for module in shapes}
