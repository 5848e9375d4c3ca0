"""Qwen-Image 2.1 as ComfyUI packs a model, gate and values of the MLP in one weight; adapters name its halves."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter.naming.image.families import Fused
from loratools.adapter.naming.image.families.qwen_image_21 import FAMILY as _APART

_PARTS = ("transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj")

FAMILY = replace(
    _APART,
    summary="Qwen-Image 2.1 as ComfyUI packs it",
    renames={name: ours for name, ours in _APART.renames.items() if name not in _PARTS},
    fused={"transformer_blocks.{}.img_mlp.gate_up": Fused(_PARTS)},
    prefixes={},
    like="qwen_image_21",
)
"""The names of a base, in which no adapter is written."""
