"""LTX-Video: diffusers' converter moves every row where the family's data say."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.ltx import FAMILY
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers as convert

    model = model_of(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, num_layers=2, caption_channels=12,
    )  # fmt: skip
    prove(FAMILY, model, convert, prefix="model.diffusion_model.")
