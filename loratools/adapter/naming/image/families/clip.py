"""CLIP-L, CLIP-H and CLIP-G text encoders, as their checkpoints have them; transformers 5 takes `text_model` out."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
    "layer_norm1", "layer_norm2",
)  # fmt: skip
FAMILY = Family(
    summary="CLIP",
    component="text_encoder",
    renames=same(
        "text_projection", "text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding",
        *(f"{root}{name}" for root in ("text_model.", "")
          for name in ("final_layer_norm", *(f"encoder.layers.{{}}.{layer}" for layer in _LAYER))),
    ),
)  # fmt: skip
"""CLIP."""
