"""HiDream-I1 and E1: diffusers took the original's names over, experts included."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_ATTENTION = tuple(f"attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm"))
_EXPERTS = tuple(
    f"ff_i.{x}" for x in ("gate", *(f"{e}.w{n}" for e in ("shared_experts", "experts.{}") for n in (1, 2, 3)))
)
_SINGLE = ("adaLN_modulation.1", *_ATTENTION, *_EXPERTS)
_DOUBLE = (*_SINGLE, *(f"{x}_t" for x in _ATTENTION), "ff_t.w1", "ff_t.w2", "ff_t.w3")

FAMILY = Family(
    summary="HiDream-I1 and E1",
    renames=same(
        "t_embedder.timestep_embedder.linear_1", "t_embedder.timestep_embedder.linear_2",
        "p_embedder.pooled_embedder.linear_1", "p_embedder.pooled_embedder.linear_2",
        "x_embedder.proj", "caption_projection.{}.linear", "final_layer.linear", "final_layer.adaLN_modulation.1",
        *(f"double_stream_blocks.{{}}.block.{x}" for x in _DOUBLE),
        *(f"single_stream_blocks.{{}}.block.{x}" for x in _SINGLE),
    ),
    encoders={
        "text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te2_", "clip_g"),
        "text_encoder_3": ("lora_te3_", "t5xxl"),
    },
    called=(r"hidream",),
    depths={"double_stream_blocks": (16,), "single_stream_blocks": (32,)},
)  # fmt: skip
"""HiDream: one naming for all of its readers."""
