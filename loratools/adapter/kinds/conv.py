"""LoRA on a convolution: ΔW[o, i, k…] = s·Σ_q B[o, q]·A[q, i, k…], in PEFT's layout, for one to three kernel sides.

A is (r, in, k…), a convolution with the kernel of the layer; B is (out, r, 1…), one of kernel 1. Both seen as matrices,
first side × the rest, this is ΔW = s·B·A of a linear layer (PEFT's `_ConvNd.get_delta_weight`, kohya's `merge_to`).
With `lora_bias`, b' = b + s·c. Grouped convolutions are refused, as PEFT refuses to merge them: there B is
(out, r/groups, 1…).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.kinds.lora import A_PART, B_PART, BIAS_PART, check_bias
from loratools.storage.lazy import LazyTensor

KIND = "conv"


@dataclass(frozen=True, slots=True, eq=False)
class ConvUpdate(LowRank):
    """s·B·A for a convolution. Raises `ValueError` where the factors are not those of one with a single group."""

    A: LazyTensor
    B: LazyTensor
    scaling: float
    alpha: float
    C: LazyTensor | None = None

    kind = KIND

    def __post_init__(self) -> None:
        A, B = self.A.shape, self.B.shape
        if 0 in A + B:
            raise ValueError(f"empty factors, A {A} and B {B} (an ungathered ZeRO-3 or FSDP save?)")
        if len(A) not in (3, 4, 5) or len(B) != len(A) or set(B[2:]) != {1}:
            raise ValueError(f"A {A} and B {B} are no convolution's; expected (r, in, k…) and (out, r, 1…)")
        if A[0] != B[1]:
            grouped = A[0] > B[1] and A[0] % B[1] == 0
            why = f": a convolution with {A[0] // B[1]} groups, which cannot be merged" if grouped else ""
            raise ValueError(f"A {A} and B {B} do not share a rank{why}")
        check_bias(self.C, B[0])

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], *self.A.shape[1:]

    @property
    def bias(self) -> LazyTensor | None:
        return self.C

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A_PART: self.A, B_PART: self.B} | ({BIAS_PART: self.C} if self.C else {})

    def factored(self) -> Factors:
        """Return B as (out, r) and A as (r, in·k…)."""
        out, rank = self.B.shape[:2]
        return Factors(self.B.reshaped((out, rank)), self.A.reshaped((rank, prod(self.A.shape[1:]))), self.scaling)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are two factors with kernels, with or without a bias of B."""
    return parts.keys() - {BIAS_PART} == {A_PART, B_PART} and len(parts[A_PART].shape) in (3, 4, 5)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> ConvUpdate:
    """Return the update of two factors."""
    return ConvUpdate(parts[A_PART], parts[B_PART], scaling, alpha, parts.get(BIAS_PART))
