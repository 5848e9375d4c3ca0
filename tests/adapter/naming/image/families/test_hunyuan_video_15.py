"""HunyuanVideo 1.5: Tencent's names and ComfyUI's packing lead to diffusers' modules, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from loratools.adapter.naming.image.families import Family, hunyuan_video_15, hunyuan_video_15_comfy
from tests.adapter.naming.image.families.scripts import BYT5, tencent
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")

RENAMES = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1", "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "vision_in.proj.0": "image_embedder.norm_in", "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2", "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed", **BYT5,
}  # fmt: skip
"""What diffusers' script for 1.5 calls otherwise than its converter for HunyuanVideo."""


def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return tencent(tensors, RENAMES)


@pytest.mark.parametrize("family", [hunyuan_video_15.FAMILY, hunyuan_video_15_comfy.FAMILY], ids=["apart", "packed"])
def test_rows_go_where_the_families_say(family: Family) -> None:
    prove(family, build("hunyuan_video_15"), convert)
