"""HunyuanImage: ComfyUI's packing and Tencent's lead to diffusers' modules, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor, nn

from loratools.adapter.naming.image.families import Family, hunyuan_image, hunyuan_image_tencent
from tests.adapter.naming.image.families.scripts import BYT5, tencent
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")

RENAMES = {
    **BYT5,
    "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
    "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
}  # fmt: skip
"""What diffusers' script for HunyuanImage calls otherwise than its converter for HunyuanVideo."""


def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return tencent(tensors, RENAMES)


def _model() -> nn.Module:
    return model_of(  # as wide as HunyuanVideo, which its converter holds for given
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=24,
        attention_head_dim=128, num_layers=2, num_single_layers=2, text_embed_dim=12, text_embed_2_dim=6,
        guidance_embeds=True, rope_axes_dim=(64, 64), use_meanflow=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", [hunyuan_image.FAMILY, hunyuan_image_tencent.FAMILY], ids=["packed", "apart"])
def test_rows_go_where_the_families_say(family: Family) -> None:
    prove(family, _model(), convert)
