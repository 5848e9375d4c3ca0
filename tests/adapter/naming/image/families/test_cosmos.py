"""Cosmos-Predict2 and Anima: diffusers' converters move every row where the family's data say."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.adapter.naming.image.families.cosmos import FAMILY
from tests.make.image_families import TARGETS, lora, originals, prove, shapes_of
from tests.make.image_models import build

pytest.importorskip("diffusers")


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

    prove(FAMILY, build("cosmos", **config), convert, prefix="net.")


def test_diffusers_reads_animas_loras_under_these_names() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as convert

    shapes = shapes_of(build("cosmos"), TARGETS)
    names = {name.rpartition(".lora_")[0] for name in convert(lora(originals(FAMILY, shapes)))}
    assert names == {f"transformer.{module}" for module in shapes}
