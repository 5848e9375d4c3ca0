"""What diffusers' conversion scripts do that are no part of its library, as several families need it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BYT5 = {
    "byt5_in.layernorm": "context_embedder_2.norm", "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2", "byt5_in.fc3": "context_embedder_2.linear_3",
}  # fmt: skip
"""Renames of Tencent's second text embedder."""


def replaced(name: str, replacements: Mapping[str, str]) -> str:
    """Return a tensor's name after all replacements, in their order."""
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


def tencent(tensors: dict[str, Tensor], renames: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Convert as the scripts for HunyuanVideo 1.5 and HunyuanImage do: by HunyuanVideo's converter, and these renames.

    Their blocks are HunyuanVideo's, but the files have projections apart.
    """
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    own = {}
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if module in renames:
            own[f"{renames[module]}.{kind}"] = tensors.pop(name)
    for name in list(tensors):
        stream, _, rest = name.partition("_attn_q.")
        if rest and name.startswith("double_blocks."):
            tensors[f"{stream}_attn_qkv.{rest}"] = torch.cat([tensors.pop(f"{stream}_attn_{x}.{rest}") for x in "qkv"])
        block, _, rest = name.partition(".linear1_q.")
        if rest:
            parts = [tensors.pop(f"{block}.linear1_{x}.{rest}") for x in ("q", "k", "v", "mlp")]
            tensors[f"{block}.linear1.{rest}"] = torch.cat(parts)
        if ".linear2.fc." in name:
            tensors[name.replace(".fc.", ".")] = tensors.pop(name)
    return {**own, **convert_hunyuan_video_transformer_to_diffusers(tensors)}
