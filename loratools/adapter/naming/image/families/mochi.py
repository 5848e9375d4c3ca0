"""Mochi 1 of Genmo.

The original's MLP has the gate before the values, diffusers' has the values before the gate; the last modulation is
swapped too. The last block has no MLP for the text, and another name for the text's modulation.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, within

_BLOCK = {
    "mod_x": "norm1.linear", "mod_y": "norm1_context.linear",
    "attn.proj_x": "attn1.to_out.0", "attn.proj_y": "attn1.to_add_out",
    "attn.q_norm_x": "attn1.norm_q", "attn.k_norm_x": "attn1.norm_k",
    "attn.q_norm_y": "attn1.norm_added_q", "attn.k_norm_y": "attn1.norm_added_k",
    "mlp_x.w1": "ff.net.0.proj", "mlp_x.w2": "ff.net.2",
    "mlp_y.w1": "ff_context.net.0.proj", "mlp_y.w2": "ff_context.net.2",
}  # fmt: skip

FAMILY = Family(
    summary="Mochi 1",
    renames={
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        **within("t5_y_embedder", "time_embed.pooler", {"to_kv": "to_kv", "to_q": "to_q", "to_out": "to_out"}),
        "t5_yproj": "time_embed.caption_proj",
        "blocks.47.mod_y": "transformer_blocks.47.norm1_context.linear_1",
        **within("blocks.{}", "transformer_blocks.{}", _BLOCK),
        "final_layer.mod": "norm_out.linear", "final_layer.linear": "proj_out",
    },
    fused={
        "blocks.{}.attn.qkv_x": Fused(tuple(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")),
        "blocks.{}.attn.qkv_y": Fused(tuple(f"transformer_blocks.{{}}.attn1.add_{x}_proj" for x in "qkv")),
    },
    swapped=frozenset({"blocks.{}.mlp_x.w1", "blocks.{}.mlp_y.w1", "final_layer.mod"}),
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (3072,) for x in "qkv"},
    },
    called=(r"(?<![a-z])mochi(?![a-z])",),
    depths={"blocks": (48,), "transformer_blocks": (48,)},
)  # fmt: skip
"""Mochi 1: block 47 is the last."""
