"""Qwen-Image 2.1: names are the model's own; diffusers takes ComfyUI's packed MLP apart where the family says."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families import Family, qwen_image_21, qwen_image_21_comfy
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", [qwen_image_21.FAMILY, qwen_image_21_comfy.FAMILY], ids=["apart", "packed"])
def test_diffusers_converter_moves_rows_where_the_family_says(family: Family) -> None:
    from diffusers.loaders.single_file_utils import convert_qwen_image21_transformer_checkpoint_to_diffusers as convert

    prove(family, build("qwen_image_21"), convert, prefix="model.diffusion_model.")
