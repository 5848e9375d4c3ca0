"""HunyuanVideo under the names of ComfyUI's own model, in which its trainer writes."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter.naming.image.families import _hunyuan
from loratools.adapter.naming.image.families.hunyuan_video import FAMILY as _TENCENT

FAMILY = replace(
    _TENCENT,
    summary="HunyuanVideo in ComfyUI's names",
    renames=_hunyuan.as_comfy(_TENCENT.renames),
    fused=_hunyuan.as_comfy(_TENCENT.fused),
    proportions=_hunyuan.as_comfy(_TENCENT.proportions),
    prefixes={},
    like="hunyuan_video",
)
"""Read, and never written unless a base has these names."""
