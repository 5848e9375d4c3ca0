"""HunyuanImage 2.1 as ComfyUI repacks it and sd-scripts trains it: q, k and v in one weight, with the MLP's first."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _hunyuan

FAMILY = Family(
    summary="HunyuanImage",
    renames={
        **_hunyuan.COMMON, **_hunyuan.SINGLE, **_hunyuan.BYT5,
        **{
            f"{theirs}_in.mlp.{layer}": f"time_guidance_embed.{ours}.linear_{number}"
            for theirs, ours in (
                ("time", "timestep_embedder"), ("time_r", "timestep_embedder_r"), ("guidance", "guidance_embedder"),
            )
            for number, layer in ((1, 0), (2, 2))
        },
    },
    fused={**_hunyuan.REFINER_QKV, **_hunyuan.DOUBLE_QKV, **_hunyuan.SINGLE_LINEAR1},
    swapped=_hunyuan.SWAPPED,
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3584,) for x in "qkv"},
        **{f"single_transformer_blocks.{{}}.attn.to_{x}": (3584,) for x in "qkv"},
    },
    called=(r"hunyuan[-_ ]?image",),
    depths={
        "double_blocks": (20,), "single_blocks": (40,), "transformer_blocks": (20,), "single_transformer_blocks": (40,),
    },
    proportions=_hunyuan.PROPORTIONS,
)  # fmt: skip
"""HunyuanImage of Tencent."""
