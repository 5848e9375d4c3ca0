"""T5-XXL and UMT5-XXL encoders."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_ATTENTION, _FEED = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
FAMILY = Family(
    summary="T5",
    component="text_encoder",
    renames=same(
        "shared", "encoder.final_layer_norm",
        *(f"{_ATTENTION}SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
        *(f"{_FEED}DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
        *(f"{layer}layer_norm" for layer in (_ATTENTION, _FEED)),
    ),
)  # fmt: skip
"""T5."""
