"""PixArt alpha and sigma: q, k and v of the self-attention are fused in the original, and k and v of the cross."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, within

_BLOCK = ("blocks.{}", "transformer_blocks.{}")
_EMBEDDERS = {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}

FAMILY = Family(
    summary="PixArt alpha and sigma",
    renames={
        "x_embedder.proj": "pos_embed.proj",
        **{
            f"{theirs}_embedder.mlp.{layer}": f"adaln_single.emb.{ours}_embedder.linear_{number}"
            for theirs, ours in _EMBEDDERS.items()
            for layer, number in ((0, 1), (2, 2))
        },
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        **within(*_BLOCK, {
            "attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q", "cross_attn.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
        }),
        "final_layer.linear": "proj_out",
    },
    fused={
        "blocks.{}.attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")),
        "blocks.{}.cross_attn.kv_linear": Fused(tuple(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "kv")),
    },
    encoders={"text_encoder": ("lora_te1_", "t5xxl")},
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (1152,) for x in "qkv"},
        "blocks.{}.attn.qkv": (1152,),
    },
    called=(r"pixart",),
    depths={"blocks": (28,), "transformer_blocks": (28,)},
    proportions={
        "blocks.{}.attn.qkv": (3, 1), "blocks.{}.cross_attn.kv_linear": (2, 1),
        "blocks.{}.mlp.fc1": (4, 1), "blocks.{}.mlp.fc2": (1, 4),
    },
)  # fmt: skip
"""PixArt: where it shares a name with Sana, both namings agree."""
