"""Stable Diffusion 1 and 2: kohya's trainers flatten diffusers' names, most readers know the original's too."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family
from loratools.adapter.naming.image.families._unet import unet

FAMILY = Family(
    summary="Stable Diffusion 1 and 2",
    component="unet",
    renames=unet((True, True, True, False)),
    kohya="diffusers",
    encoders={"text_encoder": ("lora_te_", "clip_l")},
    called=(r"\b(stable-diffusion-)?v?(1-[45]|2-[01])\b", r"\bsd_?v?[12]\b", r"stable-diffusion-2\b"),
)
"""Stable Diffusion 1 and 2."""
