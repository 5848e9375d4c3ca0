"""Chroma: Flux.1's blocks without modulations of their own, which a guidance layer makes."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same, within

_DOUBLE, _SINGLE = ("double_blocks.{}", "transformer_blocks.{}"), ("single_blocks.{}", "single_transformer_blocks.{}")
_GUIDANCE = "distilled_guidance_layer"

FAMILY = Family(
    summary="Chroma",
    renames={
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        **same(f"{_GUIDANCE}.in_proj", f"{_GUIDANCE}.out_proj", f"{_GUIDANCE}.norms.{{}}"),
        **within(f"{_GUIDANCE}.layers.{{}}", f"{_GUIDANCE}.layers.{{}}", {
            "in_layer": "linear_1", "out_layer": "linear_2",
        }),
        **within(*_DOUBLE, {
            "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
            "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        }),
        **within(*_SINGLE, {
            "linear2": "proj_out", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
        }),
    },
    fused={
        "double_blocks.{}.img_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
        "double_blocks.{}.txt_attn.qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
        "single_blocks.{}.linear1": Fused(
            tuple(f"single_transformer_blocks.{{}}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            (1, 1, 1, 4),
        ),
    },
    encoders={"text_encoder": ("lora_te1_", "t5xxl")},
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        "double_blocks.{}.img_attn.qkv": (3072,), "single_blocks.{}.linear1": (3072,),
    },
    called=(r"chroma",),
    depths={
        "double_blocks": (19,), "single_blocks": (38,), "transformer_blocks": (19,), "single_transformer_blocks": (38,),
        f"{_GUIDANCE}.layers": (5,),
    },
    proportions={
        "double_blocks.{}.img_attn.qkv": (3, 1), "double_blocks.{}.txt_attn.qkv": (3, 1),
        "double_blocks.{}.img_mlp.0": (4, 1), "double_blocks.{}.img_mlp.2": (1, 4),
        "double_blocks.{}.txt_mlp.0": (4, 1), "double_blocks.{}.txt_mlp.2": (1, 4),
        "single_blocks.{}.linear1": (7, 1), "single_blocks.{}.linear2": (1, 5),
    },
)  # fmt: skip
"""Chroma: where it shares a name with Flux.1, both namings agree."""
