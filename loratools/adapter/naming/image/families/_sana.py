"""The names of Sana's blocks, which Sana 1 and 1.5, and Sana Sprint share."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter.naming.image.families import Family, Fused, within


def family(summary: str, embedders: Mapping[str, str], called: str) -> Family:
    """Return the family with these names of the time's embedders."""
    return Family(
        summary=summary,
        renames={
            "x_embedder.proj": "patch_embed.proj",
            **{
                f"{theirs}.mlp.{layer}": f"time_embed.{ours}.linear_{number}"
                for theirs, ours in embedders.items()
                for layer, number in ((0, 1), (2, 2))
            },
            "t_block.1": "time_embed.linear", "attention_y_norm": "caption_norm",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            **within("blocks.{}", "transformer_blocks.{}", {
                "attn.proj": "attn1.to_out.0", "attn.q_norm": "attn1.norm_q", "attn.k_norm": "attn1.norm_k",
                "cross_attn.q_linear": "attn2.to_q", "cross_attn.proj": "attn2.to_out.0",
                "cross_attn.q_norm": "attn2.norm_q", "cross_attn.k_norm": "attn2.norm_k",
                "mlp.inverted_conv.conv": "ff.conv_inverted", "mlp.depth_conv.conv": "ff.conv_depth",
                "mlp.point_conv.conv": "ff.conv_point",
            }),
            "final_layer.linear": "proj_out",
        },
        fused={
            "blocks.{}.attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")),
            "blocks.{}.cross_attn.kv_linear": Fused(tuple(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "kv")),
        },
        inputs={
            **{f"transformer_blocks.{{}}.attn1.to_{x}": (1152, 2240) for x in "qkv"},
            "blocks.{}.attn.qkv": (1152, 2240),
        },
        called=(called,),
        depths={"blocks": (20, 28, 60), "transformer_blocks": (20, 28, 60)},
        proportions={"blocks.{}.attn.qkv": (3, 1), "blocks.{}.cross_attn.kv_linear": (2, 1)},
    )  # fmt: skip
