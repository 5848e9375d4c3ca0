"""Stable Cascade's prior (stage C): ComfyUI and kohya's trainer keep the attention's wrapper in its names."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_BLOCK = {
    "attention.attn.to_q": "attention.to_q", "attention.attn.to_k": "attention.to_k",
    "attention.attn.to_v": "attention.to_v", "attention.attn.out_proj": "attention.to_out.0",
    **same("kv_mapper.1", "depthwise", "channelwise.0", "channelwise.4", "mapper", "mapper_sca", "mapper_crp"),
}  # fmt: skip

FAMILY = Family(
    summary="Stable Cascade",
    component="prior",
    renames={
        **same(
            "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding.1", "clf.1",
            "down_downscalers.{}.1", "down_downscalers.{}.1.blocks.0", "up_upscalers.{}.1",
            "up_upscalers.{}.1.blocks.1", "down_repeat_mappers.{}.{}", "up_repeat_mappers.{}.{}",
        ),
        **within("down_blocks.{}.{}", "down_blocks.{}.{}", _BLOCK),
        **within("up_blocks.{}.{}", "up_blocks.{}.{}", _BLOCK),
    },
    prefixes={"comfy": "diffusion_model.", "kohya": "lora_prior_unet_"},
    encoders={"text_encoder": ("lora_prior_te_", "clip_g")},
    called=(r"cascade",),
)  # fmt: skip
"""Stable Cascade: the prior, which is what people train."""
