"""Kandinsky 5: one naming, everywhere."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_ATTENTION = ("to_query", "to_key", "to_value", "out_layer", "query_norm", "key_norm")
_TEXT, _VISUAL = (
    [*(f"{attention}.{name}" for attention in attentions for name in _ATTENTION), "feed_forward.in_layer",
     "feed_forward.out_layer", modulation]
    for attentions, modulation in (
        (("self_attention",), "text_modulation.out_layer"),
        (("self_attention", "cross_attention"), "visual_modulation.out_layer"),
    )
)  # fmt: skip

FAMILY = Family(
    summary="Kandinsky 5",
    renames={
        **same(
            "time_embeddings.in_layer", "time_embeddings.out_layer", "text_embeddings.in_layer", "text_embeddings.norm",
            "pooled_text_embeddings.in_layer", "pooled_text_embeddings.norm", "visual_embeddings.in_layer",
            "out_layer.modulation.out_layer", "out_layer.out_layer",
        ),
        **within("text_transformer_blocks.{}", "text_transformer_blocks.{}", same(*_TEXT)),
        **within("visual_transformer_blocks.{}", "visual_transformer_blocks.{}", same(*_VISUAL)),
    },
    called=(r"kandinsky[-_ ]?5",),
)  # fmt: skip
"""Kandinsky 5, Lite and Pro."""
