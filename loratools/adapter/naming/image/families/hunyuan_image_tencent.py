"""HunyuanImage 2.1 as Tencent's files have it, all projections apart."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter.naming.image.families import _hunyuan, within
from loratools.adapter.naming.image.families.hunyuan_image import FAMILY as _PACKED

FAMILY = replace(
    _PACKED,
    summary="HunyuanImage as Tencent packs it",
    renames={
        **{name: ours for name, ours in _PACKED.renames.items() if name != "single_blocks.{}.linear2"},
        **_hunyuan.DOUBLE_APART,
        **within("single_blocks.{}", "single_transformer_blocks.{}", {
            "linear1_q": "attn.to_q", "linear1_k": "attn.to_k", "linear1_v": "attn.to_v", "linear1_mlp": "proj_mlp",
            "linear2.fc": "proj_out",
        }),
    },
    fused=_hunyuan.REFINER_QKV,
    proportions={name: sides for name, sides in _hunyuan.PROPORTIONS.items() if "_mlp." in name},
    prefixes={},
    like="hunyuan_image",
)  # fmt: skip
"""Read, and never written unless a base has these names."""
