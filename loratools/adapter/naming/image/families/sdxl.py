"""SDXL, and what was made of it (Kolors, Playground, SSD-1B).

kohya's trainers flatten the original's names or diffusers'; their readers know both.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family
from loratools.adapter.naming.image.families._unet import unet

FAMILY = Family(
    summary="SDXL",
    component="unet",
    renames=unet((False, True, True)),
    kohya="either",
    encoders={"text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te2_", "clip_g")},
    called=(r"\bsdxl", r"xl[-_]base", r"stable-diffusion-xl"),
)
"""SDXL."""
