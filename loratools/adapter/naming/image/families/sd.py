"""Stable Diffusion 1 and 2: kohya's trainers flatten diffusers' names, most readers know the original's too."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _unet

_RENAMES = _unet.unet((True, True, True, False))

FAMILY = Family(
    summary="Stable Diffusion 1 and 2",
    component="unet",
    renames=_RENAMES,
    kohya="diffusers",
    encoders={"text_encoder": ("lora_te_", "clip_l")},
    inputs=_unet.inputs(_RENAMES, (320, 640, 1280, 0), (768, 1024)),
    called=(r"\b(stable-diffusion-)?v?(1-[45]|2-[01])\b", r"\bsd_?v?[12]\b", r"stable-diffusion-2\b"),
    depths=_unet.depths(_RENAMES, 1),
)
"""Stable Diffusion 1 and 2."""
