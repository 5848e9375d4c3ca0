"""HunyuanVideo 1.5 as Tencent and musubi-tuner have it, q, k and v apart."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _hunyuan, within

FAMILY = Family(
    summary="HunyuanVideo 1.5",
    renames={
        **_hunyuan.COMMON, **_hunyuan.BYT5, **_hunyuan.DOUBLE_APART,
        **within("vision_in.proj", "image_embedder", {
            "0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out",
        }),
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
        "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
        "cond_type_embedding": "cond_type_embed",
    },
    fused=_hunyuan.REFINER_QKV,
    swapped=_hunyuan.SWAPPED,
    prefixes={"kohya": "lora_unet_"},
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (2048,) for x in "qkv"},
    },
    called=(r"hunyuan[-_ ]?video[-_ ]?1[._]5",),
    depths={"double_blocks": (54,), "transformer_blocks": (54,)},
)  # fmt: skip
"""HunyuanVideo 1.5 of Tencent."""
