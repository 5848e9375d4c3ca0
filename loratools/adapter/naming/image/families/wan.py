"""Wan 2.1 and 2.2 with their image, VACE and Animate models, SkyReels V2 and ChronoEdit.

The original's `norm3`, before the cross-attention, is diffusers' `norm2`; the other norms of a block have no weights.
Models for images have k and v of the image beside the text's, VACE has blocks of its own beside the others, Animate a
face adapter whose k and v are one weight, SkyReels a projection of the frame rate.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same, within

_BLOCK = {
    **within("self_attn", "attn1", {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    }),
    **within("cross_attn", "attn2", {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
    }),
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table",
}  # fmt: skip

FAMILY = Family(
    summary="Wan 2.1, 2.2, VACE and Animate, SkyReels V2",
    renames={
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        **same("patch_embedding", "vace_patch_embedding", "pose_patch_embedding"),
        **within("blocks.{}", "blocks.{}", _BLOCK),
        **within("vace_blocks.{}", "vace_blocks.{}", {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
        "head.head": "proj_out", "head.modulation": "scale_shift_table",
        "fps_embedding": "fps_embedding", "fps_projection.0": "fps_projection.net.0.proj",
        "fps_projection.2": "fps_projection.net.2",
        **within("face_encoder", "face_encoder", {
            "conv1_local.conv": "conv1_local", "conv2.conv": "conv2", "conv3.conv": "conv3", "out_proj": "out_proj",
        }),
        **within("face_adapter.fuser_blocks.{}", "face_adapter.{}", {
            "linear1_q": "to_q", "linear2": "to_out", "q_norm": "norm_q", "k_norm": "norm_k",
        }),
    },
    fused={"face_adapter.fuser_blocks.{}.linear1_kv": Fused(("face_adapter.{}.to_k", "face_adapter.{}.to_v"))},
    called=(r"(?<![a-z])wan(?![a-z])", r"wan-?ai", r"skyreels-?v2", r"chronoedit"),
    depths={
        "blocks": (30, 40), "vace_blocks": (0, 8, 15), "face_adapter.fuser_blocks": (0, 8), "face_adapter": (0, 8),
    },
)  # fmt: skip
"""Wan and its relatives; no other family has `cross_attn.o` or `ffn.net.0.proj` in `blocks`."""
