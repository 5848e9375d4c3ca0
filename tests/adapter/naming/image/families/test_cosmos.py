"""Cosmos-Predict2 and Anima: diffusers' converters move every row where the family's data say."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from loratools.adapter.naming.image.families.cosmos import FAMILY
from tests.make.image_families import TARGETS, lora, model_of, originals, prove, shapes_of

diffusers = pytest.importorskip("diffusers")


def _model(**config: Any) -> nn.Module:
    return model_of(
        diffusers.CosmosTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        num_layers=2, text_embed_dim=12, adaln_lora_dim=4, encoder_hidden_states_channels=12, extra_pos_embed_type=None,
        **config,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_crossattn_projection": True, "crossattn_proj_in_channels": 14},
        {"img_context_dim_in": 6, "img_context_num_tokens": 3, "img_context_dim_out": 8},
    ],
    ids=["2", "2.5", "images"],
)
def test_diffusers_converter_moves_rows_where_the_family_says(config: dict[str, Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers as convert

    prove(FAMILY, _model(**config), convert, prefix="net.")


def test_diffusers_reads_animas_loras_under_these_names() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as convert

    shapes = shapes_of(_model(), TARGETS)
    names = {name.rpartition(".lora_")[0] for name in convert(lora(originals(FAMILY, shapes)))}
    assert names == {f"transformer.{module}" for module in shapes}
