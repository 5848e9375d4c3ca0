"""CogVideoX and 1.5: SwissArmyTransformer's names and diffusers', in which adapters are trained and read.

The modulations of a block are one weight there and two in diffusers, whose rows alternate: an adapter of them keeps its
name.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, within

FAMILY = Family(
    summary="CogVideoX",
    renames={
        "mixins.patch_embed.proj": "patch_embed.proj", "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2",
        **within("transformer.layers.{}", "transformer_blocks.{}", {
            "attention.dense": "attn1.to_out.0", "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
            "input_layernorm": "norm1.norm", "post_attention_layernorm": "norm2.norm",
        }),
        "mixins.adaln_layer.query_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_q",
        "mixins.adaln_layer.key_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_k",
        "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm", "mixins.final_layer.linear": "proj_out",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    fused={
        "transformer.layers.{}.attention.query_key_value": Fused(
            tuple(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")
        ),
    },
    diffusers_in_comfy=True,
    kohya="diffusers",
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (1920, 3072) for x in "qkv"},
    },
    called=(r"cogvideo-?x",),
    depths={"transformer.layers": (30, 42), "transformer_blocks": (30, 42)},
)  # fmt: skip
"""CogVideoX of THUDM."""
