"""LoRA on a linear layer: W' = W + s·B·A (Hu et al. 2021, arXiv 2106.09685), in PEFT's layout.

A is (r, in), B is (out, r). The scaling s is α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732); who reads a file
works it out once and hands it over as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

    from loratools.adapter.sites import Site

KIND = "lora"
A_PART, B_PART = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate:
    """s·B·A for a linear layer. Raises `ValueError` where A and B do not share a rank, or one is empty."""

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
            raise ValueError(f"A {A} and B {B} do not share a rank; expected (r, in) and (out, r)")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A_PART: self.A, B_PART: self.B}

    def term(self, site: Site, weight: float, dtype: torch.dtype, device: torch.device) -> Product:
        """Return `Product(w·s·B, A)`, or `Product(w·s·Aᵀ, Bᵀ)` where the base stores [in, out]."""
        A = self.A.load().to(device=device, dtype=dtype)
        B = self.B.load().to(device=device, dtype=dtype)[site.part_rows] * (weight * self.scaling)
        return Product(A.T.contiguous(), B.T.contiguous()) if site.transposed else Product(B, A)

    def project(self, X: torch.Tensor, weight: float, base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return w·s·(X·Aᵀ)·Bᵀ, (k, out), float64."""
        A, B = self.A.load().to(X), self.B.load().to(X)
        return weight * self.scaling * ((X @ A.T) @ B.T)

    def delta_weight(self) -> torch.Tensor:
        """Return s·B·A, (out, in), float32."""
        return self.scaling * (self.B.load().float() @ self.A.load().float())


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """The term W += left · right, with left (rows, k) and right (k, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    needs_base = False
    needs_pass = False

    def observe_rows(self, base: torch.Tensor, rows: slice) -> None:
        """Nothing to see: the sum does not depend on W."""

    def apply_rows(self, W: torch.Tensor, rows: slice, base: torch.Tensor | None) -> None:
        """Add rows of the product in place: one GEMM, no temporary ΔW."""
        W.addmm_(self.left[rows], self.right)

    def bound(self) -> float:
        """Return a bound on any element of the product: the largest row norm of left times column norm of right."""
        return float(self.left.norm(dim=1).max() * self.right.norm(dim=0).max())

    def elements(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return single elements of the product in float64."""
        return (self.left[rows].double() * self.right[:, columns].T.double()).sum(1)

    @classmethod
    def joined(cls, products: list[Product]) -> Product:
        """Return the sum of several products as one, exactly: factors side by side along k."""
        import torch

        if len(products) == 1:
            return products[0]
        return cls(torch.cat([p.left for p in products], 1), torch.cat([p.right for p in products], 0))


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the two factors of a linear layer."""
    return parts.keys() == {A_PART, B_PART} and len(parts[A_PART].shape) == 2


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> LoraUpdate:
    """Return the update of two factors."""
    return LoraUpdate(parts[A_PART], parts[B_PART], scaling, alpha)
