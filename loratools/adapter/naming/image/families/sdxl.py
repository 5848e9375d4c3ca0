"""SDXL, and what was made of it (Kolors, Playground, SSD-1B): kohya's trainers flatten the original's names.

Other trainers flatten diffusers' names; readers of pictures know both, kohya's trainers find only their own.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _unet

_RENAMES = _unet.unet((False, True, True))

FAMILY = Family(
    summary="SDXL",
    component="unet",
    renames=_RENAMES,
    encoders={"text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te2_", "clip_g")},
    inputs=_unet.inputs(_RENAMES, (0, 640, 1280), (2048,)),
    called=(r"\bsdxl", r"xl[-_]base", r"stable-diffusion-xl"),
    depths=_unet.depths(_RENAMES, 1, 2, 4, 10),
)
"""SDXL; SSD-1B has attentions of one block and of four."""
