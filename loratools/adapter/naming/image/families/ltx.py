"""LTX-Video."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

ATTENTION = {**same("to_q", "to_k", "to_v", "to_out.0"), "q_norm": "norm_q", "k_norm": "norm_k"}
"""An attention's modules in LTX-Video and LTX-2."""

FAMILY = Family(
    summary="LTX-Video",
    renames={
        "patchify_proj": "proj_in", **same("proj_out", "scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
        **within("adaln_single", "time_embed", same(
            "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear",
        )),
        **same("caption_projection.linear_1", "caption_projection.linear_2"),
        **within("transformer_blocks.{}", "transformer_blocks.{}", {
            **within("attn1", "attn1", ATTENTION), **within("attn2", "attn2", ATTENTION),
            **same("ff.net.0.proj", "ff.net.2"),
        }),
    },
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (2048,) for x in "qkv"},
        "transformer_blocks.{}.attn2.to_k": (2048,), "transformer_blocks.{}.attn2.to_v": (2048,),
    },
    called=(r"ltx[-_ ]?(?!2)(video|v)",),
    depths={"transformer_blocks": (28, 48)},
)  # fmt: skip
"""LTX-Video of Lightricks."""
