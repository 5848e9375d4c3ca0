"""Stable Diffusion 3 and 3.5: q, k and v of the image's and the text's stream are fused in the original.

The last modulations have shift before scale in the original, scale before shift in diffusers: `final_layer`'s always,
and the text stream's in the last block, where it has no more than these two.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same, within

_BLOCK = ("joint_blocks.{}", "transformer_blocks.{}")
_MLP = {"mlp.fc1": "net.0.proj", "mlp.fc2": "net.2"}

FAMILY = Family(
    summary="Stable Diffusion 3 and 3.5",
    renames={
        "x_embedder.proj": "pos_embed.proj", **same("context_embedder"),
        **{
            f"{theirs}_embedder.mlp.{layer}": f"time_text_embed.{ours}_embedder.linear_{number}"
            for theirs, ours in (("t", "timestep"), ("y", "text"))
            for layer, number in ((0, 1), (2, 2))
        },
        **within(*_BLOCK, {
            "x_block.attn.proj": "attn.to_out.0", "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k", "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
            "context_block.attn.proj": "attn.to_add_out", "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
            **{f"x_block.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            **{f"context_block.{theirs}": f"ff_context.{ours}" for theirs, ours in _MLP.items()},
        }),
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    fused={
        f"joint_blocks.{{}}.{block}.qkv": Fused(tuple(f"transformer_blocks.{{}}.{part.format(x)}" for x in "qkv"))
        for block, part in (
            ("x_block.attn", "attn.to_{}"), ("context_block.attn", "attn.add_{}_proj"), ("x_block.attn2", "attn2.to_{}")
        )
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    swapped_if={"joint_blocks.{}.context_block.adaLN_modulation.1": (2, 1)},
    encoders={
        "text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te2_", "clip_g"),
        "text_encoder_3": ("lora_te3_", "t5xxl"),
    },
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (1536, 2432) for x in "qkv"},
        "joint_blocks.{}.x_block.attn.qkv": (1536, 2432),
    },
    called=(r"stable-?_?diffusion-?_?3", r"\bsd-?_?3"),
    depths={"joint_blocks": (24, 38), "transformer_blocks": (24, 38)},
    proportions={
        "joint_blocks.{}.x_block.attn.qkv": (3, 1), "joint_blocks.{}.context_block.attn.qkv": (3, 1),
        "joint_blocks.{}.x_block.mlp.fc1": (4, 1), "joint_blocks.{}.x_block.mlp.fc2": (1, 4),
        "joint_blocks.{}.context_block.mlp.fc1": (4, 1), "joint_blocks.{}.context_block.mlp.fc2": (1, 4),
    },
)  # fmt: skip
"""Stable Diffusion 3 medium, 3.5 large, turbo and medium (whose first blocks have two attentions)."""
