"""The UNet of Stable Diffusion 1, 2 and SDXL: the original's module names and diffusers', both ways.

    input_blocks.4.1.transformer_blocks.0.attn1.to_q   =   down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q

There are two resnets (and attentions) in each block on the way down and three on the way up, and one down- or upsampler
after them: block n of the original is 3·i + j.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WHOLE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_RESNET_BACK = {ours: theirs for theirs, ours in _RESNET.items()}
_WHOLE |= {f"input_blocks.{3 * i + 3}.0.op": f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)}
_WHOLE |= {f"output_blocks.{3 * i + 2}.{j}.conv": f"up_blocks.{i}.upsamplers.0.conv" for i in range(3) for j in (1, 2)}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}
_LAYERS = {
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
} | {
    f"{theirs}.{n + shift}.{kind}": f"{ours}.{n // 3}.{name}.{n % 3}"
    for theirs, ours, shift in (("input_blocks", "down_blocks", 1), ("output_blocks", "up_blocks", 0))
    for n in range(12)
    for kind, name in enumerate(("resnets", "attentions"))
}  # fmt: skip
_LAYERS_BACK = {ours: theirs for theirs, ours in _LAYERS.items()}
_LAYER = re.compile(r"(\w+_block\.(?:\w+\.)?\d|\w+_blocks\.\d+\.(?:\w+\.)?\d)\.(.+)")


def to_diffusers(module: str) -> str | None:
    """Return diffusers' name of a module of the original, or None.

    >>> to_diffusers("output_blocks.5.2.conv")
    'up_blocks.1.upsamplers.0.conv'
    """
    return _WHOLE.get(module) or _renamed(module, _LAYERS, _RESNET)


def to_original(module: str, *, xl: bool) -> str | None:
    """Return the original's name of a module of diffusers, or None.

    SDXL's first block on the way up has attention, Stable Diffusion 1's and 2's has none: there the upsampler's number
    differs.
    """
    if module == "up_blocks.0.upsamplers.0.conv" and not xl:
        return "output_blocks.2.1.conv"
    return _WHOLE_BACK.get(module) or _renamed(module, _LAYERS_BACK, _RESNET_BACK)


def _renamed(module: str, layers: Mapping[str, str], resnet: Mapping[str, str]) -> str | None:
    match = _LAYER.fullmatch(module)
    layer = layers.get(match[1]) if match else None
    if match is None or layer is None:
        return None
    inside = match[2] if "attentions" in layer + match[1] else resnet.get(match[2])
    return f"{layer}.{inside}" if inside else None


def is_xl(modules: Iterable[str]) -> bool:
    """Tell SDXL by diffusers' names: attention where Stable Diffusion 1 and 2 have none, or deep transformers."""
    mark = re.compile(r"up_blocks\.0\.attentions|transformer_blocks\.[1-9]\.|add_embedding|text_encoder_2\.")
    return any(mark.search(module) for module in modules)
