"""ERNIE-Image: diffusers took the original's names over."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_BLOCK = (
    "self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0",
    "self_attention.norm_q", "self_attention.norm_k", "adaLN_sa_ln", "adaLN_mlp_ln",
    "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2",
)  # fmt: skip

FAMILY = Family(
    summary="ERNIE-Image",
    renames=same(
        "x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "adaLN_modulation.1",
        "final_norm.linear", "final_linear", *(f"layers.{{}}.{x}" for x in _BLOCK),
    ),
    called=(r"ernie-?_?image",),
    depths={"layers": (36,)},
)  # fmt: skip
"""ERNIE-Image: one naming for all of its readers."""
