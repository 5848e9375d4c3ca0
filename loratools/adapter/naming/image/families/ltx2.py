"""LTX-2 and 2.3: a video and an audio stream with attention between them."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within
from loratools.adapter.naming.image.families.ltx import ATTENTION

_EMBEDDERS = {
    "adaln_single": "time_embed", "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln", "audio_prompt_adaln_single": "audio_prompt_adaln",
}  # fmt: skip
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

FAMILY = Family(
    summary="LTX-2",
    renames={
        "patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in",
        **same("proj_out", "audio_proj_out", "scale_shift_table", "audio_scale_shift_table"),
        **{
            f"{theirs}.{layer}": f"{ours}.{layer}"
            for theirs, ours in _EMBEDDERS.items()
            for layer in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
        },
        **same(*(f"{stream}caption_projection.linear_{n}" for stream in ("", "audio_") for n in (1, 2))),
        **within("transformer_blocks.{}", "transformer_blocks.{}", {
            name: ours
            for attention in _ATTENTIONS
            for name, ours in within(attention, attention, {**ATTENTION, **same("to_gate_logits")}).items()
        }),
        **same(*(f"transformer_blocks.{{}}.{ff}.net.{n}" for ff in ("ff", "audio_ff") for n in ("0.proj", "2"))),
        **within("transformer_blocks.{}", "transformer_blocks.{}", {
            **same("scale_shift_table", "audio_scale_shift_table"),
            **same("prompt_scale_shift_table", "audio_prompt_scale_shift_table"),
            "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
            "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
        }),
    },
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (4096,) for x in "qkv"},
        "transformer_blocks.{}.attn2.to_k": (4096,), "transformer_blocks.{}.attn2.to_v": (4096,),
    },
    called=(r"ltx[-_ ]?(v[-_ ]?)?2",),
    depths={"transformer_blocks": (48,)},
)  # fmt: skip
"""LTX-2 of Lightricks."""
