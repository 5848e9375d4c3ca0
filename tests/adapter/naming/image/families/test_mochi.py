"""Mochi 1: diffusers' converter moves every row where the family's data say."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter.naming.image.families.mochi import FAMILY
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers as convert

    model = model_of(
        diffusers.MochiTransformer3DModel, num_attention_heads=2, attention_head_dim=8, num_layers=48,
        pooled_projection_dim=12, in_channels=4, text_embed_dim=12, time_embed_dim=8,
    )  # fmt: skip
    prove(FAMILY, model, convert, also={"pos_frequencies": torch.zeros(3, 2, 4)})
