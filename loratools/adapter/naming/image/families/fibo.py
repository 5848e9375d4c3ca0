"""Bria's FIBO: Bria's names, and a projection of the caption for each block."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same
from loratools.adapter.naming.image.families._bria import MODULES

FAMILY = Family(
    summary="FIBO",
    renames=same(*MODULES, "caption_projection.{}.linear"),
    called=(r"fibo(?!-?_?2)",),
    depths={"transformer_blocks": (8,), "single_transformer_blocks": (38,)},
)
"""FIBO and its edit models."""
