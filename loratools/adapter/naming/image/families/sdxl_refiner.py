"""The refiner of SDXL: four resolutions, of which those in the middle have attention."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family
from loratools.adapter.naming.image.families._unet import unet

FAMILY = Family(
    summary="the refiner of SDXL",
    component="unet",
    renames=unet((False, True, True, False)),
    kohya="either",
    encoders={"text_encoder_2": ("lora_te2_", "clip_g")},
    called=(r"refiner",),
)
"""The refiner of SDXL."""
