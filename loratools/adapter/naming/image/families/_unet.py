"""The UNet of Stable Diffusion: the original numbers all blocks in one row, diffusers by resolution and place.

    input_blocks.4.1.transformer_blocks.0.attn1.to_q   =   down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q

There are two resnets (and attentions) in each block on the way down and three on the way up, and one down- or upsampler
after them: block n of the original is 3·i + j. Where a block on the way up has attention, its upsampler comes third.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.adapter.naming.image.families import same, within

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}  # fmt: skip
_LAYERS = (*(f"{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")),
           "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")  # fmt: skip
_OF_TEXTS = (("attn2", "k"), ("attn2", "v"))
"""The projections whose input is the text's."""
_ATTENTION = same("norm", "proj_in", "proj_out", *(f"transformer_blocks.{{}}.{layer}" for layer in _LAYERS))


def unet(attention: tuple[bool, ...]) -> dict[str, str]:
    """Return the renames of a UNet; `attention` says of each resolution, the finest first, whether it has attention."""
    return dict(_renames(attention))


def inputs(renames: Mapping[str, str], widths: tuple[int, ...], context: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the input features of a UNet's attentions by module, in both namings of `renames`.

    `widths` has the channels of each resolution, the finest first, 0 where it has no attention; `context` the features
    of the texts that published models take.
    """
    ours = {
        f"{block}.transformer_blocks.{{}}.{attention}.to_{x}": context if (attention, x) in _OF_TEXTS else (width,)
        for width, block in _attentions(widths) for attention in ("attn1", "attn2") for x in "qkv"
    }  # fmt: skip
    return ours | {original: ours[name] for original, name in renames.items() if name in ours}


def depths(renames: Mapping[str, str], *published: int) -> dict[str, tuple[int, ...]]:
    """Return the numbers of transformer blocks that published models have in an attention, by list of them."""
    pairs = [(original, name) for original, name in renames.items() if ".{}" in name]
    return {side.partition(".{}")[0]: published for pair in pairs for side in pair}


def _attentions(widths: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Yield the width and the name of every attention, under diffusers' names."""
    for i, width in enumerate(widths):
        yield from ((width, f"down_blocks.{i}.attentions.{j}") for j in range(2) if width)
    yield widths[-1] or widths[-2], "mid_block.attentions.0"
    for i, width in enumerate(reversed(widths)):
        yield from ((width, f"up_blocks.{i}.attentions.{j}") for j in range(3) if width)


def _renames(attention: tuple[bool, ...]) -> Iterator[tuple[str, str]]:
    yield from {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    }.items()  # fmt: skip
    last = len(attention) - 1
    resnet = _RESNET | {"skip_connection": "conv_shortcut"}
    for i, attends in enumerate(attention):
        for j in range(2):
            n = 3 * i + j + 1
            yield from within(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", resnet).items()
            if attends:
                yield from within(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", _ATTENTION).items()
        if i < last:
            yield f"input_blocks.{3 * i + 3}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
    yield from within("middle_block.0", "mid_block.resnets.0", _RESNET).items()
    yield from within("middle_block.1", "mid_block.attentions.0", _ATTENTION).items()
    yield from within("middle_block.2", "mid_block.resnets.1", _RESNET).items()
    for i, attends in enumerate(reversed(attention)):
        for j in range(3):
            n = 3 * i + j
            yield from within(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", resnet).items()
            if attends:
                yield from within(f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}", _ATTENTION).items()
        if i < last:
            yield f"output_blocks.{3 * i + 2}.{1 + attends}.conv", f"up_blocks.{i}.upsamplers.0.conv"
