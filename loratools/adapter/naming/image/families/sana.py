"""Sana 1 and 1.5: PixArt's attentions, and convolutions for MLPs."""

from __future__ import annotations

from loratools.adapter.naming.image.families._sana import family

FAMILY = family("Sana", {"t_embedder": "emb.timestep_embedder"}, r"\bsana(?!.*sprint)")
"""Sana 0.6B, 1.6B and 4.8B."""
