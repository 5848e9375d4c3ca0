"""Bria's FIBO: Bria's names, and a projection of the caption for each block."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same
from loratools.adapter.naming.image.families._bria import MODULES

FAMILY = Family(
    summary="FIBO",
    renames=same(
        *MODULES, "caption_projection.{}.linear", "guidance_embed.timestep_embedder.linear_1",
        "guidance_embed.timestep_embedder.linear_2",
    ),
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    },
    called=(r"fibo(?!-?_?2)",),
    rather=("flux",),
    depths={"transformer_blocks": (8,), "single_transformer_blocks": (38,)},
)  # fmt: skip
"""FIBO and its edit models."""
