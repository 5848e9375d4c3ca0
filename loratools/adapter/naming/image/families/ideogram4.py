"""Ideogram 4: the original fuses q, k and v in equal parts, and calls the output projection `o`."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same

_BLOCK = (
    "adaln_modulation", "attention.norm_q", "attention.norm_k", "attention_norm1", "attention_norm2", "ffn_norm1",
    "ffn_norm2", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip

FAMILY = Family(
    summary="Ideogram 4",
    renames={
        **same(
            "input_proj", "llm_cond_norm", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj",
            "embed_image_indicator", "final_layer.linear", "final_layer.adaln_modulation",
            *(f"layers.{{}}.{x}" for x in _BLOCK),
        ),
        "layers.{}.attention.o": "layers.{}.attention.to_out.0",
    },
    fused={"layers.{}.attention.qkv": Fused(tuple(f"layers.{{}}.attention.to_{x}" for x in "qkv"))},
    inputs={
        **{f"layers.{{}}.attention.to_{x}": (4608,) for x in "qkv"}, "layers.{}.attention.qkv": (4608,),
    },
    called=(r"ideogram",),
    depths={"layers": (34,)},
    proportions={"layers.{}.attention.qkv": (3, 1)},
)  # fmt: skip
"""Ideogram 4; its files also say `conditional_transformer.` for `diffusion_model.`."""
