"""Bria's FIBO 2: blocks of Z-Image's kind with a cross-attention, under diffusers' names for all of its readers."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_FFN = ("w1", "w2", "w3")


def _attention(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"))


_BLOCK = (
    *_attention("attention"), *(f"feed_forward.{x}" for x in _FFN), "attention_norm1", "attention_norm2", "ffn_norm1",
    "ffn_norm2", "adaLN_modulation.0",
)  # fmt: skip
_CROSS = (*_BLOCK, *_attention("cross_attention"), "cross_attn_norm1", "cross_attn_norm2")
_PERCEIVER = (
    *_attention("cross_attention"), *_attention("self_attention"), *(f"ffn.{x}" for x in _FFN), "cross_attn_norm",
    "self_attn_norm", "ffn_norm",
)  # fmt: skip

FAMILY = Family(
    summary="FIBO 2",
    renames=same(
        "x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "perceiver.norm_out", "final_layer.linear",
        "final_layer.adaLN_modulation.1", *(f"noise_refiner.{{}}.{x}" for x in _BLOCK),
        *(f"layers.{{}}.{x}" for x in _CROSS), *(f"perceiver.layers.{{}}.{x}" for x in _PERCEIVER),
    ),
    inputs={
        **{f"layers.{{}}.attention.to_{x}": (3584,) for x in "qkv"},
    },
    called=(r"fibo-?_?2",),
)  # fmt: skip
"""FIBO 2."""
