"""The spellings of diffusers' LoRA names, from the attention processors of 2023 to PEFT's."""

from __future__ import annotations

import re

ALPHA = "alpha"

_DOWN_UP = {"down": "lora_A.weight", "up": "lora_B.weight"}
# Attention processors of 2023 had the projection in the parameter's name, and CLIP's projections had the UNet's names.
_OUT = {"to_out": "to_out.0"}
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_CURRENT = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.weight)?(?:\.default(?:\.weight)?)?")
_OLD = re.compile(r"(?P<module>.+?)(?:\.lora\.|\.lora_linear_layer\.|\.lora_)(?P<side>down|up)\.weight")
_PROCESSOR = re.compile(
    r"(?P<at>.+)\.(?P<name>to_[qkv]|to_out|add_[kqv]_proj|to_add_out)_lora\.(?P<side>down|up)\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora|\.lora_linear_layer)?\.alpha")


def split(name: str) -> tuple[str, str] | None:
    """Return (module with its component, PEFT's part or `ALPHA`), or None for a name of no known spelling.

    >>> split("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight")
    ('unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0', 'lora_B.weight')
    >>> split("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight")
    ('text_encoder.text_model.encoder.layers.0.self_attn.q_proj', 'lora_A.weight')
    """
    if match := _PROCESSOR.fullmatch(name):
        at = match["at"].removesuffix(".processor")
        names = _CLIP if at.endswith(".self_attn") else _OUT
        return f"{at}.{names.get(match['name'], match['name'])}", _DOWN_UP[match["side"]]
    if match := _MAGNITUDE.fullmatch(name):
        return match["module"], "lora_magnitude_vector"
    if match := _CURRENT.fullmatch(name):
        part = f"{match['part']}.{match['what']}"
    elif match := _OLD.fullmatch(name):
        part = _DOWN_UP[match["side"]]
    elif match := _ALPHA.fullmatch(name):
        part = ALPHA
    return (match["module"].replace(".processor", ""), part) if match else None
