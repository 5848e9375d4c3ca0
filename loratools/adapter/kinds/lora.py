"""LoRA on a linear layer: W' = W + s·B·A (Hu et al. 2021, arXiv 2106.09685), in PEFT's layout.

A is (r, in), B is (out, r). The scaling s is α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732); who reads a file
works it out once and hands it over as a number. With PEFT's `lora_bias`, B has a bias c (out,), and b' = b + s·c.

PEFT's layer for `nn.MultiheadAttention` is of this kind too: there W is `in_proj_weight`, (3·out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor

KIND = "lora"
A_PART, B_PART, BIAS_PART = "lora_A.weight", "lora_B.weight", "lora_B.bias"


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate(LowRank):
    """s·B·A for a linear layer. Raises `ValueError` where A and B do not share a rank, or one is empty."""

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
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise ValueError(f"A {A} and B {B} do not share a rank; expected (r, in) and (out, r)")
        check_bias(self.C, B[0])

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def bias(self) -> LazyTensor | None:
        return self.C

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A_PART: self.A, B_PART: self.B} | ({BIAS_PART: self.C} if self.C else {})

    def factored(self) -> Factors:
        """Return B and A."""
        return Factors(self.B, self.A, self.scaling)


def check_bias(bias: LazyTensor | None, out: int) -> None:
    """Raise `ValueError` unless the bias of B has one number for each output feature."""
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"{BIAS_PART} has shape {bias.shape}, expected ({out},)")


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the two factors of a linear layer, with or without a bias of B."""
    return parts.keys() - {BIAS_PART} == {A_PART, B_PART} and len(parts[A_PART].shape) == 2


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> LoraUpdate:
    """Return the update of two factors."""
    return LoraUpdate(parts[A_PART], parts[B_PART], scaling, alpha, parts.get(BIAS_PART))
