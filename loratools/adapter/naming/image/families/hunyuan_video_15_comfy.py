"""HunyuanVideo 1.5 as ComfyUI repacks and reads it, q, k and v in one weight."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter.naming.image.families import _hunyuan
from loratools.adapter.naming.image.families.hunyuan_video_15 import FAMILY as _TENCENT

FAMILY = replace(
    _TENCENT,
    summary="HunyuanVideo 1.5 as ComfyUI packs it",
    renames={name: ours for name, ours in _TENCENT.renames.items() if name not in _hunyuan.DOUBLE_APART},
    fused={**_TENCENT.fused, **_hunyuan.DOUBLE_QKV},
    prefixes={"comfy": "diffusion_model."},
    like="hunyuan_video_15",
)
"""The same modules with fused projections."""
