"""LTX-2's connectors from text encoder to model: in the model of one file, in diffusers a component of their own."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within
from loratools.adapter.naming.image.families.ltx import ATTENTION

FAMILY = Family(
    summary="LTX-2's connectors",
    component="connectors",
    renames={
        name: ours
        for stream in ("video", "audio")
        for name, ours in within(
            f"{stream}_embeddings_connector.transformer_1d_blocks.{{}}", f"{stream}_connector.transformer_blocks.{{}}",
            {**within("attn1", "attn1", {**ATTENTION, **same("to_gate_logits")}), **same("ff.net.0.proj", "ff.net.2")},
        ).items()
    } | {
        "text_embedding_projection.aggregate_embed": "text_proj_in",
        "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
        "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
    },
    beside=True,
)  # fmt: skip
"""The connectors, and the projection of the text's features before them."""
