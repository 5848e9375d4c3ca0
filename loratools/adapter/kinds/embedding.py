"""LoRA on an embedding: ΔW = s·(B·A)ᵀ for W (V, d), V rows of dimension d (PEFT's `lora.Embedding`).

A is (r, V) and B is (d, r): row v of the embedding changes by s·B·A[:, v].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor

KIND = "embedding"
A_PART, B_PART = "lora_embedding_A", "lora_embedding_B"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingUpdate(LowRank):
    """s·(B·A)ᵀ for an embedding. Raises `ValueError` where A and B do not share a rank, or one is empty."""

    A: LazyTensor
    B: LazyTensor
    scaling: float
    alpha: float

    kind = KIND

    def __post_init__(self) -> None:
        A, B = self.A.shape, self.B.shape
        if 0 in A + B:
            raise ValueError(f"empty factors, A {A} and B {B} (an ungathered ZeRO-3 or FSDP save?)")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise ValueError(f"A {A} and B {B} do not share a rank; expected (r, vocabulary) and (dimension, r)")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.A.shape[1], self.B.shape[0]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A_PART: self.A, B_PART: self.B}

    def factored(self) -> Factors:
        """Return Aᵀ (V, r) and Bᵀ (r, d)."""
        left, right = (lazy.map(lambda tensor: tensor.T, lazy.shape[::-1]) for lazy in (self.A, self.B))
        return Factors(left, right, self.scaling)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the two factors of an embedding."""
    return parts.keys() == {A_PART, B_PART}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> EmbeddingUpdate:
    """Return the update of two factors."""
    return EmbeddingUpdate(parts[A_PART], parts[B_PART], scaling, alpha)
