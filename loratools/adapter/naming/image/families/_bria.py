"""The names of Bria 3.2 and FIBO, which are diffusers' names of Flux.1's blocks: they have no others."""

from __future__ import annotations

_DOUBLE = (
    "norm1.linear", "norm1_context.linear", "attn.to_out.0", "attn.to_add_out", "attn.norm_q", "attn.norm_k",
    "attn.norm_added_q", "attn.norm_added_k", *(f"attn.to_{x}" for x in "qkv"), *(f"attn.add_{x}_proj" for x in "qkv"),
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
_SINGLE = ("norm.linear", "proj_mlp", "proj_out", "attn.norm_q", "attn.norm_k", *(f"attn.to_{x}" for x in "qkv"))

MODULES = (
    "time_embed.timestep_embedder.linear_1", "time_embed.timestep_embedder.linear_2",
    "context_embedder", "x_embedder", "norm_out.linear", "proj_out",
    *(f"transformer_blocks.{{}}.{x}" for x in _DOUBLE), *(f"single_transformer_blocks.{{}}.{x}" for x in _SINGLE),
)  # fmt: skip
"""What both have."""
