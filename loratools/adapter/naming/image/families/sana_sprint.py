"""Sana Sprint: Sana's blocks, with an embedder of the guidance beside the time's."""

from __future__ import annotations

from loratools.adapter.naming.image.families._sana import family

_EMBEDDERS = {"t_embedder": "timestep_embedder", "cfg_embedder": "guidance_embedder"}

FAMILY = family("Sana Sprint", _EMBEDDERS, r"\bsana.*sprint")
"""Sana Sprint 0.6B and 1.6B."""
