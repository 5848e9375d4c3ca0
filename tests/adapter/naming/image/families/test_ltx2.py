"""LTX-2: diffusers' converters move every row where the family's data say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor, nn

from loratools.adapter.naming.image.families.ltx2 import FAMILY
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")


def _model(*, gated: bool) -> nn.Module:
    return model_of(
        diffusers.LTX2VideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, audio_in_channels=8, audio_out_channels=8,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        caption_channels=12, gated_attn=gated, cross_attn_mod=gated, audio_gated_attn=gated, audio_cross_attn_mod=gated,
    )  # fmt: skip


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers as convert

    prove(FAMILY, _model(gated=False), convert, prefix="model.diffusion_model.")


def test_the_modules_of_2_3_are_called_as_diffusers_calls_them_in_a_lora() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as convert

    def renamed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name.removeprefix("transformer."): tensor for name, tensor in convert(tensors).items()}

    prove(FAMILY, _model(gated=True), renamed, prefix="diffusion_model.")
