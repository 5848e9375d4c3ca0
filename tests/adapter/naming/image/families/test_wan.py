"""Wan and its relatives: diffusers' converter moves every row where the family's data say."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.adapter.naming.image.families.wan import FAMILY
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 8, "ffn_dim": 24, "num_layers": 2,
}  # fmt: skip
IMAGE = {"image_dim": 8, "added_kv_proj_dim": 16}


@pytest.mark.parametrize(
    ("name", "config", "unknown"),
    [
        ("WanTransformer3DModel", {}, ()),
        ("WanTransformer3DModel", IMAGE, ()),
        ("WanVACETransformer3DModel", {"vace_layers": [0, 1], "vace_in_channels": 8}, ()),
        ("WanAnimateTransformer3DModel", {**IMAGE, "num_layers": 6, "latent_channels": 4, "in_channels": 12},
         ("motion_encoder.",)),
        ("SkyReelsV2Transformer3DModel", {"inject_sample_info": True}, ("fps_projection.",)),
        ("ChronoEditTransformer3DModel", IMAGE, ()),
    ],
)  # fmt: skip
def test_diffusers_converter_moves_rows_where_the_family_says(
    name: str, config: dict[str, Any], unknown: tuple[str, ...]
) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    prove(FAMILY, model_of(getattr(diffusers, name), **{**TINY, **config}), convert, without=unknown)
