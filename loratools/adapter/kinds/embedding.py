"""LoRA on an embedding: ΔW = s·(B·A)ᵀ for W (V, d), V rows of dimension d (PEFT's `lora.Embedding`).

A is (r, V) and B is (d, r): row v of the embedding changes by s·B·A[:, v].
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter.kinds._product import TwoFactors
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingUpdate(TwoFactors):
    """s·(B·A)ᵀ for an embedding."""

    kind = "embedding"
    names = (A_EMBEDDING, B_EMBEDDING)
    expected = "(r, vocabulary) and (dimension, r)"
    takes_bias = False
    transposed = True


claims, build = EmbeddingUpdate.claims, EmbeddingUpdate.build
