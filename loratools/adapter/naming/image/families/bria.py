"""Bria 3.2: its names are diffusers', for all of its readers."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same
from loratools.adapter.naming.image.families._bria import MODULES

FAMILY = Family(
    summary="Bria 3.2",
    renames=same(*MODULES),
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    },
    called=(r"\bbria-?_?[23]",),
)
"""Bria 3.2."""
