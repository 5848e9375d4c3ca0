"""The UNet of Stable Diffusion 1, 2 and SDXL: the original's module names and diffusers', both ways.

    input_blocks.4.1.transformer_blocks.0.attn1.to_q   =   down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q

There are two resnets (and attentions) in each block on the way down and three on the way up, and one down- or upsampler
after them: block n of the original is 3·i + j.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WHOLE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_RESNET_BACK = {ours: theirs for theirs, ours in _RESNET.items()}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_MIDDLE_BACK = {ours: theirs for theirs, ours in _MIDDLE.items()}


def to_diffusers(module: str) -> str | None:
    """Return diffusers' name of a module of the original, or None.

    >>> to_diffusers("output_blocks.5.2.conv")
    'up_blocks.1.upsamplers.0.conv'
    """
    if module in _WHOLE:
        return _WHOLE[module]
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", module):
        rest = match[2] if match[1] == "1" else _RESNET.get(match[2])
        return f"mid_block.{_MIDDLE[match[1]]}.{rest}" if rest else None
    if match := re.fullmatch(r"input_blocks\.([369])\.0\.op", module):
        return f"down_blocks.{int(match[1]) // 3 - 1}.downsamplers.0.conv"
    if match := re.fullmatch(r"output_blocks\.([258])\.[12]\.conv", module):
        return f"up_blocks.{int(match[1]) // 3}.upsamplers.0.conv"
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)", module):
        number = int(match[2]) - (match[1] == "input")
        side = "down" if match[1] == "input" else "up"
        rest = match[4] if match[3] == "1" else _RESNET.get(match[4])
        kind = "attentions" if match[3] == "1" else "resnets"
        return f"{side}_blocks.{number // 3}.{kind}.{number % 3}.{rest}" if rest and number >= 0 else None
    return None


def to_original(module: str, *, xl: bool) -> str | None:
    """Return the original's name of a module of diffusers, or None.

    SDXL's first block on the way up has attention, Stable Diffusion 1's and 2's has none: there the upsampler's number
    differs.
    """
    if module in _WHOLE_BACK:
        return _WHOLE_BACK[module]
    if match := re.fullmatch(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)", module):
        rest = match[2] if match[1] == "attentions.0" else _RESNET_BACK.get(match[2])
        return f"middle_block.{_MIDDLE_BACK[match[1]]}.{rest}" if rest else None
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{3 * (int(match[1]) + 1)}.0.op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        block = int(match[1])
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 and not xl else 2}.conv"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.([012])\.(.+)", module):
        number = 3 * int(match[2]) + int(match[4]) + (match[1] == "down")
        side = "input" if match[1] == "down" else "output"
        rest = match[5] if match[3] == "attentions" else _RESNET_BACK.get(match[5])
        return f"{side}_blocks.{number}.{int(match[3] == 'attentions')}.{rest}" if rest else None
    return None


def is_xl(modules: Iterable[str]) -> bool:
    """Tell SDXL by diffusers' names: attention where Stable Diffusion 1 and 2 have none, or deep transformers."""
    mark = re.compile(r"up_blocks\.0\.attentions|transformer_blocks\.[1-9]\.|add_embedding|text_encoder_2\.")
    return any(mark.search(module) for module in modules)
