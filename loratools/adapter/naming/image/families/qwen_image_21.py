"""Qwen-Image 2.1: one naming in adapters everywhere."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

FAMILY = Family(
    summary="Qwen-Image 2.1",
    renames=same(
        "img_in", "txt_in.text_norm", "txt_in.in_layer", "txt_in.out_layer", "modulation.1", "norm_out.linear",
        "proj_out", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        *(
            f"transformer_blocks.{{}}.{module}"
            for module in (
                "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.norm_q", "attn.norm_k",
                "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out",
            )
        ),
    ),
    inputs={f"transformer_blocks.{{}}.attn.to_{x}": (4096,) for x in "qkv"},
    called=(r"qwen[-_ ]?image[-_ ]?2[._]1",),
)  # fmt: skip
"""Qwen-Image 2.1; `img_mlp.gate_layer` is its own."""
