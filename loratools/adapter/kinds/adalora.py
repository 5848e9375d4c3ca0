"""AdaLoRA: ΔW = s·B·diag(E)·A, singular values that training prunes (arXiv 2303.10512), as PEFT stores it.

`lora_A` (r, in·…), `lora_E` (r, 1), `lora_B` (out, r). PEFT's s is α/(r₀ + 10⁻⁵) with the rank r₀ at the beginning,
whatever rank is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._named import NamedProduct
from loratools.storage.lazy import LazyTensor

_A, _B, _E = "lora_A", "lora_B", "lora_E"


@dataclass(frozen=True, slots=True, eq=False)
class AdaloraUpdate(NamedProduct):
    """The three factors. Raises `ValueError` where they do not share a rank."""

    kind = "adalora"

    def check(self) -> None:
        A, B, E = (self.tensors[name].shape for name in (_A, _B, _E))
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (A[0], 1) != E:
            raise ValueError(f"A {A}, E {E} and B {B} do not share a rank; expected (r, in), (r, 1) and (out, r)")
        NamedProduct.check(self)

    @property
    def rank(self) -> int:
        return self.tensors[_A].shape[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[_B].shape[0], self.tensors[_A].shape[1]

    def left(self) -> Tensor:
        """Return B."""
        return self.number(_B)

    def right(self) -> Tensor:
        """Return diag(E)·A."""
        return self.number(_E) * self.number(_A)

    def dense(self) -> Tensor:
        """Return the product as one sum over the rank."""
        import torch

        return torch.einsum("or,rx,ri->oi", self.number(_B), self.number(_E), self.number(_A))


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are two factors and the values between them."""
    return parts.keys() == {_A, _B, _E}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> AdaloraUpdate:
    """Return the update of the three factors."""
    return AdaloraUpdate(dict(parts), scaling, alpha)
