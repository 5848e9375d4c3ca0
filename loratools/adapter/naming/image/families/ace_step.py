"""ACE-Step 1: one naming, everywhere; diffusers has no such model, its code is like diffusers'."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

FAMILY = Family(
    summary="ACE-Step 1",
    renames={
        **within("transformer_blocks.{}", "transformer_blocks.{}", same(
            *(f"attn.{name}" for name in _ATTENTION),
            *(f"cross_attn.{name}" for name in (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
            "ff.inverted_conv.conv", "ff.depth_conv.conv", "ff.point_conv.conv",
        )),
        **within("lyric_encoder.encoders.{}", "lyric_encoder.encoders.{}", same(
            *(f"self_attn.linear_{name}" for name in ("q", "k", "v", "out", "pos")),
            "feed_forward.w_1", "feed_forward.w_2", "norm_ff", "norm_mha",
        )),
        **same(
            "lyric_encoder.embed.out.0", "lyric_encoder.embed.out.1", "lyric_encoder.after_norm", "lyric_embs",
            "lyric_proj", "speaker_embedder", "genre_embedder", "timestep_embedder.linear_1",
            "timestep_embedder.linear_2", "t_block.1", "projectors.{}.0", "projectors.{}.2", "projectors.{}.4",
            "proj_in.early_conv_layers.0", "proj_in.early_conv_layers.1", "proj_in.early_conv_layers.2",
            "final_layer.linear",
        ),
    },
    called=(r"ace[-_ ]?step(?![-_ ]?v?1[._]?5)",),
    depths={"transformer_blocks": (24,), "lyric_encoder.encoders": (6,)},
)  # fmt: skip
"""ACE-Step 1 of ACE Studio and StepFun."""
