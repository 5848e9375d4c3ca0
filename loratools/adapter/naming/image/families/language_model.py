"""Language models that encode text: Qwen, Gemma, Llama, Mistral; alone, or in a model of vision."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_ROOTS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
FAMILY = Family(
    summary="language models",
    component="text_encoder",
    renames=same(
        *(f"{root}{name}" for root in _ROOTS
          for name in ("embed_tokens", "norm", *(f"layers.{{}}.{layer}" for layer in _LAYER))),
    ),
)  # fmt: skip
"""Language models."""
