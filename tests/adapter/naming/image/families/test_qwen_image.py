"""Qwen-Image: the names are the model's own, in both namings, and diffusers reads them as they are."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.qwen_image import FAMILY
from tests.make.image_families import TARGETS, lora, originals, prove, shapes_of
from tests.make.image_models import build

pytest.importorskip("diffusers")


@pytest.mark.parametrize("layered", [False, True])
def test_all_modules_keep_their_names(layered: bool) -> None:
    prove(FAMILY, build("qwen_image", use_additional_t_cond=layered), dict)


@pytest.mark.parametrize(("prefix", "kohya"), [("diffusion_model.", False), ("lora_unet_", True)])
def test_diffusers_reads_a_lora_of_all_of_them_under_the_originals_names(prefix: str, kohya: bool) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers as convert

    shapes = originals(FAMILY, shapes_of(build("qwen_image"), TARGETS))
    names = {name.rpartition(".lora_")[0] for name in convert(lora(shapes, prefix=prefix, kohya=kohya))}
    assert names == {f"transformer.{module}" for module in shapes}
