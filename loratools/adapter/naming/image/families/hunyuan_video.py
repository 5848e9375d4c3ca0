"""HunyuanVideo, its models for images, SkyReels V1, FramePack: Tencent's names, which ComfyUI reads in adapters too."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _hunyuan, same

FAMILY = Family(
    summary="HunyuanVideo",
    renames={
        **_hunyuan.COMMON, **_hunyuan.SINGLE,
        **same("clean_x_embedder.proj", "clean_x_embedder.proj_2x", "clean_x_embedder.proj_4x"),
        **same("image_projection.up", "image_projection.down"),
        **{
            f"{theirs}_in.{layer}": f"time_text_embed.{ours}_embedder.linear_{number}"
            for theirs, ours, layers in (
                ("time", "timestep", ("mlp.0", "mlp.2")), ("vector", "text", ("in_layer", "out_layer")),
                ("guidance", "guidance", ("mlp.0", "mlp.2")),
            )
            for number, layer in enumerate(layers, 1)
        },
    },
    fused={**_hunyuan.REFINER_QKV, **_hunyuan.DOUBLE_QKV, **_hunyuan.SINGLE_LINEAR1},
    swapped=_hunyuan.SWAPPED,
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    },
    called=(r"hunyuan[-_ ]?video(?![-_ ]?1[._]5)", r"skyreels[-_ ]?v1", r"framepack", r"fasthunyuan"),
    depths={
        "double_blocks": (20,), "single_blocks": (40,), "transformer_blocks": (20,), "single_transformer_blocks": (40,),
    },
    proportions=_hunyuan.PROPORTIONS,
)  # fmt: skip
"""HunyuanVideo of Tencent."""
