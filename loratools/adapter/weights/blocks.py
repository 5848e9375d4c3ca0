"""Weights by the blocks of Stable Diffusion's UNet or of Flux.1, one number for each, as image people write them.

The blocks are those of CompVis' model, in the order that sd-webui-lora-block-weight made common: BASE (text encoders),
IN00…IN11, MID, OUT00…OUT11. Shorter lists name only blocks that have attention: 17 for SD 1 and 2, 12 and 20 for SDXL
(kohya-ss/sd-scripts, `svd_merge_lora.py --lbws`). A block that a list leaves out has weight 0.

Flux.1 has 61: CLIP, T5, IN, its 19 double blocks D00…D18, its 38 single blocks S00…S37, OUT. Blocks of other models
have lists of the one form that `layouts.py` makes of what their family states.
"""

from __future__ import annotations

import re

from loratools.errors import LoraToolsError


def _some(inner: str, outer: str) -> tuple[str, ...]:
    inside, outside = ([int(number) for number in numbers.split()] for numbers in (inner, outer))
    return ("BASE", *(f"IN{i:02d}" for i in inside), "MID", *(f"OUT{i:02d}" for i in outside))


FLUX = ("CLIP", "T5", "IN", *(f"D{i:02d}" for i in range(19)), *(f"S{i:02d}" for i in range(38)), "OUT")
"""The blocks of Flux.1."""
_ALL = "0 1 2 3 4 5 6 7 8 9 10 11"
LISTS = {
    len(blocks): blocks
    for blocks in (
        _some("4 5 7 8", "0 1 2 3 4 5"),
        _some("1 2 4 5 7 8", "3 4 5 6 7 8 9 10 11"),
        _some("0 1 2 3 4 5 6 7 8", "0 1 2 3 4 5 6 7 8"),
        _some(_ALL, _ALL),
        FLUX,
    )
}
"""Length of a list of weights -> the blocks that they are for, in order."""
_UNET = frozenset({12, 17, 20, 26})
OWNERS = {
    "sd": _UNET, "sdxl": _UNET, "sdxl_refiner": _UNET, "flux": frozenset({len(FLUX)}), "chroma": frozenset({len(FLUX)}),
}  # fmt: skip
"""Family -> the lengths of the lists here that are for it."""
SUMMARY = {
    length: f"{'Flux.1' if blocks is FLUX else 'a UNet'} ({blocks[0]}, {blocks[1]}, ..., {blocks[-1]})"
    for length, blocks in LISTS.items()
}
"""Length of a list -> whose it is, in words."""

_STREAM = re.compile(r"(?:^|[._])((?:single_)?transformer_blocks|double_blocks|single_blocks)[._](\d+)(?:[._]|$)")
_FLUX = {
    "T5": re.compile(r"(?:^|[._])(text_encoder_2|t5xxl|te2|te3)(?:[._]|$)"),
    "CLIP": re.compile(r"(?:^|[._])(text_encoder|clip_l|text_model|te1?)(?:[._]|$)"),
    "IN": re.compile(r"(?:^|[._])((?:img|txt|time|vector|guidance)_in|(?:x|context)_embedder|time_text\w+)(?:[._]|$)"),
    "OUT": re.compile(r"(?:^|[._])(final_layer|norm_out|proj_out)(?:[._]|$)"),
}
_DIFFUSERS = re.compile(r"(?:^|[._])(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)")
_COMPVIS = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d+)")
_MIDDLE = re.compile(r"(?:^|[._])(mid_block|middle_block)(?:[._]|$)")
_FIRST = re.compile(r"(?:^|[._])(conv_in|time_embedding|time_embed|label_emb|add_embedding)(?:[._]|$)")
_TEXT = re.compile(r"(?:^|[._])(text_encoder|text_model|te\d?|conditioner|cond_stage_model)")


def weights_of(values: list[float]) -> dict[str, float]:
    """Return block -> weight for a list of 12, 17, 20, 26 or 61 numbers; raise `LoraToolsError` for other lengths."""
    if len(values) not in LISTS:
        raise LoraToolsError(
            f"{len(values)} block weights; there are lists of {', '.join(map(str, sorted(LISTS)))} numbers: SDXL 12 or"
            " 20, SD 1 and 2 17 or 26, Flux.1 61; patterns name the blocks of any model: *.blocks.3.*=0"
        )
    return dict(zip(LISTS[len(values)], values, strict=True))


def block_of(module: str, flux: bool = False) -> str:
    """Return the block of a module by diffusers' or the original's name of it; `flux`: its blocks are Flux.1's.

    Raises `LoraToolsError` for a module that is in none of them: of another model than the list is for.

    >>> block_of("unet.down_blocks.1.attentions.0.proj_in"), block_of("text_encoder.text_model.encoder.layers.0.fc1")
    ('IN04', 'BASE')
    """
    if flux:
        return _block_of_flux(module)
    if match := _DIFFUSERS.search(module):
        side, level, part, position = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            return f"IN{3 * level + (3 if part == 'downsamplers' else position + 1):02d}"
        return f"OUT{3 * level + (2 if part == 'upsamplers' else position):02d}"
    if match := _COMPVIS.search(module):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    if _MIDDLE.search(module):
        return "MID"
    if _TEXT.search(module):
        return "BASE"
    if _FIRST.search(module):
        return "IN00"
    raise LoraToolsError(f"{module} is in no block of Stable Diffusion's UNet: block weights have none for it")


def _block_of_flux(module: str) -> str:
    if match := _STREAM.search(module):
        return f"{'S' if match[1].startswith('single') else 'D'}{int(match[2]):02d}"
    for block, names in _FLUX.items():
        if names.search(module):
            return block
    raise LoraToolsError(f"{module} is in no block of Flux.1: block weights have none for it")
