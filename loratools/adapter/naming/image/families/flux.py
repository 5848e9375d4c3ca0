"""Flux.1 of Black Forest Labs.

The original keeps q, k, v in one weight, and q, k, v and the MLP's first layer in one in the single blocks. Its last
modulation has shift before scale, diffusers' has scale before shift. Flux.2 has the same names with other MLPs.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, within

_DOUBLE, _SINGLE = ("double_blocks.{}", "transformer_blocks.{}"), ("single_blocks.{}", "single_transformer_blocks.{}")

FAMILY = Family(
    summary="Flux.1",
    renames={
        "img_in": "x_embedder", "txt_in": "context_embedder",
        **{
            f"{theirs}_in.{layer}_layer": f"time_text_embed.{ours}_embedder.linear_{number}"
            for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for layer, number in (("in", 1), ("out", 2))
        },
        **within(*_DOUBLE, {
            "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
        }),
        **within(*_SINGLE, {"linear2": "proj_out", "modulation.lin": "norm.linear"}),
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    fused={
        "double_blocks.{}.img_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
        "double_blocks.{}.txt_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
        "single_blocks.{}.linear1": Fused(
            tuple(f"single_transformer_blocks.{{}}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            (1, 1, 1, 4),
        ),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    encoders={"text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te3_", "t5xxl")},
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        "double_blocks.{}.img_attn.qkv": (3072,), "single_blocks.{}.linear1": (3072,),
    },
    called=(r"flux\.?-?1\b",),
    depths={
        "double_blocks": (19,), "single_blocks": (38,), "transformer_blocks": (19,), "single_transformer_blocks": (38,),
    },
    proportions={
        "double_blocks.{}.img_attn.qkv": (3, 1), "double_blocks.{}.txt_attn.qkv": (3, 1),
        "double_blocks.{}.img_mlp.0": (4, 1), "double_blocks.{}.img_mlp.2": (1, 4),
        "double_blocks.{}.txt_mlp.0": (4, 1), "double_blocks.{}.txt_mlp.2": (1, 4),
        "single_blocks.{}.linear1": (7, 1), "single_blocks.{}.linear2": (1, 5),
    },
)  # fmt: skip
"""Flux.1, with the proportions that tell it from Flux.2."""
