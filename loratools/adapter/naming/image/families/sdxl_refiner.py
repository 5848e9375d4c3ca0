"""The refiner of SDXL: four resolutions, of which those in the middle have attention."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _unet

_RENAMES = _unet.unet((False, True, True, False))

FAMILY = Family(
    summary="the refiner of SDXL",
    component="unet",
    renames=_RENAMES,
    encoders={"text_encoder_2": ("lora_te2_", "clip_g")},
    inputs=_unet.inputs(_RENAMES, (0, 768, 1536, 0), (1280,)),
    called=(r"refiner",),
    depths=_unet.depths(_RENAMES, 1, 4),
)
"""The refiner of SDXL; its attentions have four blocks, of which an adapter may change one."""
