"""What Flux.1, Flux.2 and Chroma share: double and single blocks of Black Forest Labs, whose attention is fused."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Fused

DOUBLE = ("double_blocks.{}", "transformer_blocks.{}")
SINGLE = ("single_blocks.{}", "single_transformer_blocks.{}")
"""A block in both namings."""

DOUBLE_PROJECTIONS = {"img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out"}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}  # fmt: skip
DOUBLE_MLPS = {
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
"""Renames inside a double block; the MLPs are those of Flux.1 and Chroma."""

SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
"""Renames inside a single block."""

DOUBLE_QKV = {
    "double_blocks.{}.img_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
    "double_blocks.{}.txt_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
}
"""A double block's q, k and v."""

SINGLE_LINEAR1 = {
    "single_blocks.{}.linear1": Fused(
        tuple(f"single_transformer_blocks.{{}}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        (1, 1, 1, 4),
    ),
}
"""A single block's q, k, v and first layer of the MLP, in Flux.1 and Chroma; Flux.2's are fused in diffusers too."""

INPUTS = {
    **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    "double_blocks.{}.img_attn.qkv": (3072,), "single_blocks.{}.linear1": (3072,),
}  # fmt: skip
DEPTHS = {
    "double_blocks": (19,), "single_blocks": (38,), "transformer_blocks": (19,), "single_transformer_blocks": (38,),
}  # fmt: skip
PROPORTIONS = {
    "double_blocks.{}.img_attn.qkv": (3, 1), "double_blocks.{}.txt_attn.qkv": (3, 1),
    "double_blocks.{}.img_mlp.0": (4, 1), "double_blocks.{}.img_mlp.2": (1, 4),
    "double_blocks.{}.txt_mlp.0": (4, 1), "double_blocks.{}.txt_mlp.2": (1, 4),
    "single_blocks.{}.linear1": (7, 1), "single_blocks.{}.linear2": (1, 5),
}  # fmt: skip
"""Widths, numbers of blocks and proportions of Flux.1, which Chroma was made of."""
