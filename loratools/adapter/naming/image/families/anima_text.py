"""Anima's text adapter: in ComfyUI's file it is in the model, in diffusers a component of its own."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")

FAMILY = Family(
    summary="Anima's text adapter",
    component="text_conditioner",
    renames={
        **within("llm_adapter.blocks.{}", "blocks.{}", same(
            *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in _ATTENTION),
            "mlp.0", "mlp.2", "norm_self_attn", "norm_cross_attn", "norm_mlp",
        )),
        **{f"llm_adapter.{name}": name for name in ("embed", "in_proj", "out_proj", "norm")},
    },
    beside=True,
)  # fmt: skip
"""`llm_adapter` of Anima."""
