"""DeLoRA: ΔW = (λ/r)·B·diag(1/(‖Aₖ‖·‖Bₖ‖))·A·diag(n) (arXiv 2503.18225), as in PEFT.

Aₖ is row k of `delora_A` (r, in), Bₖ column k of `delora_B` (out, r), their norms at least 1e-4; λ is `delora_lambda`
(1,), and n `delora_w_norm` (in,) has the norms that the columns of the base's weight had when the adapter was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor

_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAST = 1e-4  # of a norm: so PEFT clamps it


@dataclass(frozen=True, slots=True, eq=False)
class DeloraUpdate(LowRank):
    """The factors, the bound and the norms. Raises `ValueError` where their shapes do not go together."""

    parts: Mapping[str, LazyTensor]

    kind = "delora"
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        A, B, bound, norms = (self.parts[name].shape for name in _PARTS)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or self.parts[_PARTS[2]].parameters != 1 or norms != A[1:]:
            raise ValueError(f"DeLoRA's tensors do not go together: A {A}, B {B}, lambda {bound}, w_norm {norms}")

    @property
    def rank(self) -> int:
        return self.parts["delora_A"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts["delora_B"].shape[0], self.parts["delora_A"].shape[1]

    def factored(self) -> Factors:
        """Return B with its columns scaled, and A with the base's norms on its columns, in float64."""

        def left() -> Tensor:
            A, B, bound = (self.parts[name].load().double() for name in _PARTS[:3])
            norms: Tensor = A.norm(dim=1).clamp(min=_LEAST) * B.norm(dim=0).clamp(min=_LEAST)
            return B * (bound / self.rank / norms)

        def right() -> Tensor:
            return self.parts["delora_A"].load().double() * self.parts["delora_w_norm"].load().double()

        (out, inner), file = self.shape, self.parts["delora_A"].file
        B = LazyTensor("F64", (out, self.rank), left, file=file)
        A = LazyTensor("F64", (self.rank, inner), right, file=file)
        return Factors(B, A, 1.0)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the four tensors."""
    return parts.keys() == set(_PARTS)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> DeloraUpdate:
    """Return the update; its scaling is in its tensors."""
    return DeloraUpdate(dict(parts))
