"""Tiny models of diffusers' classes, one or more a family of image models, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tests.make.image_families import model_of

_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 8, "ffn_dim": 24, "num_layers": 2,
}  # fmt: skip
_WAN_IMAGE = {**_WAN, "image_dim": 8, "added_kv_proj_dim": 16}
_HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "num_single_layers": 2, "text_embed_dim": 12, "rope_axes_dim": (2, 2, 4),
}  # fmt: skip
_LTX2 = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 12,
}  # fmt: skip
_COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2,
    "text_embed_dim": 12, "adaln_lora_dim": 4, "encoder_hidden_states_channels": 12, "extra_pos_embed_type": None,
}  # fmt: skip

MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "wan": ("wan", "WanTransformer3DModel", _WAN),
    "wan_image": ("wan", "WanTransformer3DModel", _WAN_IMAGE),
    "wan_vace": ("wan", "WanVACETransformer3DModel", {**_WAN, "vace_layers": [0, 1], "vace_in_channels": 8}),
    "wan_animate": (
        "wan", "WanAnimateTransformer3DModel", {**_WAN_IMAGE, "num_layers": 6, "latent_channels": 4, "in_channels": 12},
    ),
    "skyreels": ("wan", "SkyReelsV2Transformer3DModel", {**_WAN, "inject_sample_info": True}),
    "qwen_image": (
        "qwen_image", "QwenImageTransformer2DModel",
        {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
         "axes_dims_rope": (2, 2, 4)},
    ),
    "qwen_image_21": (
        "qwen_image_21", "QwenImage21Transformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "context_in_dim": 12,
         "axes_dims_rope": (2, 2, 4)},
    ),
    "ltx": (
        "ltx", "LTXVideoTransformer3DModel",
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12},
    ),
    "ltx2": ("ltx2", "LTX2VideoTransformer3DModel", _LTX2),
    "ltx2_3": (
        "ltx2", "LTX2VideoTransformer3DModel",
        {**_LTX2, "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True},
    ),
    "hunyuan_video": ("hunyuan_video", "HunyuanVideoTransformer3DModel", {**_HUNYUAN, "pooled_projection_dim": 6}),
    "framepack": (
        "hunyuan_video", "HunyuanVideoFramepackTransformer3DModel",
        {**_HUNYUAN, "pooled_projection_dim": 6, "has_image_proj": True, "image_proj_dim": 6,
         "has_clean_x_embedder": True},
    ),
    "hunyuan_video_15": (
        "hunyuan_video_15", "HunyuanVideo15Transformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "text_embed_dim": 12, "text_embed_2_dim": 6, "image_embed_dim": 10, "rope_axes_dim": (2, 2, 4),
         "use_meanflow": True},
    ),
    "hunyuan_image": (
        "hunyuan_image", "HunyuanImageTransformer2DModel",
        {**_HUNYUAN, "text_embed_2_dim": 6, "guidance_embeds": True, "rope_axes_dim": (4, 4), "use_meanflow": True},
    ),
    "cogvideox": (
        "cogvideox", "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 6,
         "ofs_embed_dim": 6, "text_embed_dim": 12, "num_layers": 2},
    ),
    "mochi": (
        "mochi", "MochiTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 48, "pooled_projection_dim": 12,
         "in_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8},
    ),
    "cosmos": ("cosmos", "CosmosTransformer3DModel", _COSMOS),
    "kandinsky5": (
        "kandinsky5", "Kandinsky5Transformer3DModel",
        {"in_text_dim": 12, "in_text_dim2": 6, "time_dim": 8, "model_dim": 16, "ff_dim": 24, "num_text_blocks": 2,
         "num_visual_blocks": 2, "axes_dims": (2, 2, 4)},
    ),
    "ace_step_15": (
        "ace_step_15", "AceStepTransformer1DModel",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4},
    ),
    "minimax_h3": (
        "minimax_h3", "MiniMaxH3Transformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 12, "num_layers": 2, "ffn_dim": 20,
         "in_channels": 4, "audio_in_channels": 4, "text_dim": 10, "freq_dim": 8, "time_embed_hidden_dim": 12,
         "time_embed_dim": 6, "rope_freq_dim": 2},
    ),
    "flux3": (
        "flux3", "Flux3Transformer2DModel",
        {"in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2),
         "flow_map": True},
    ),
}  # fmt: skip
"""Name -> (family, class of diffusers, configuration)."""


def build(name: str, *, cls: str | None = None, **other: Any) -> nn.Module:
    """Return a model on the meta device, by its name in `MODELS`; of another class, and with another configuration."""
    import diffusers

    _, usual, config = MODELS[name]
    return model_of(getattr(diffusers, cls or usual), **{**config, **other})
