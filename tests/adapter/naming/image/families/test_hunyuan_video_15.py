"""HunyuanVideo 1.5: Tencent's names and ComfyUI's packing lead to diffusers' modules, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from loratools.adapter.naming.image.families import Family, hunyuan_video_15, hunyuan_video_15_comfy
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")

RENAMES = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1", "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm", "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2", "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in", "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2", "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed",
}  # fmt: skip
"""What diffusers' script for 1.5 calls otherwise than its converter for HunyuanVideo."""


def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert as the script does: HunyuanVideo's converter, whose blocks 1.5 has, and these renames."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    own = {}
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if module in RENAMES:
            own[f"{RENAMES[module]}.{kind}"] = tensors.pop(name)
    for name in list(tensors):  # the script takes q, k and v apart from the file
        stream, _, rest = name.partition("_attn_q.")
        if rest and name.startswith("double_blocks."):
            parts = [tensors.pop(f"{stream}_attn_{x}.{rest}") for x in "qkv"]
            tensors[f"{stream}_attn_qkv.{rest}"] = torch.cat(parts)
    return {**own, **convert_hunyuan_video_transformer_to_diffusers(tensors)}


def _model() -> nn.Module:
    return model_of(
        diffusers.HunyuanVideo15Transformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, text_embed_dim=12, text_embed_2_dim=6, image_embed_dim=10,
        rope_axes_dim=(2, 2, 4), use_meanflow=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", [hunyuan_video_15.FAMILY, hunyuan_video_15_comfy.FAMILY], ids=["apart", "packed"])
def test_rows_go_where_the_families_say(family: Family) -> None:
    prove(family, _model(), convert)
