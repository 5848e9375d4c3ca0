"""The sum that most kinds come to, W += left · right, and what kinds of two factors have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter.kinds._shared import Additive, Loaded

if TYPE_CHECKING:
    import torch

    from loratools.adapter.kinds import Factors, Term, Underlying
    from loratools.adapter.site import Site


class LowRank(Additive):
    """An update s·left·right of the weight seen as a matrix: its first side × all others.

    A kind says by `factored` which of its tensors stand left and right; everything else follows.
    """

    __slots__ = ()

    @abstractmethod
    def factored(self) -> Factors:
        """Return (rows, r) and (r, columns), with the scaling."""

    def term(self, site: Site, weight: float, dtype: torch.dtype, device: torch.device) -> Product:
        """Return w·s·left · right, or w·s·rightᵀ · leftᵀ where the base stores the transpose."""
        left, right = (factor.to(device=device, dtype=dtype) for factor in self.factored().load())
        left = left[site.part_rows]
        if site.transposed:
            left, right = right.T, left.T
        return Product.of(weight * self.scaling, left.contiguous(), right.contiguous())

    def project(self, X: torch.Tensor, weight: float, under: Underlying) -> torch.Tensor:
        """Return X·Wᵀ + w·s·(X·rightᵀ)·leftᵀ."""
        left, right = (factor.to(X) for factor in self.factored().load())
        return under.below(X) + weight * self.scaling * ((X @ right.T) @ left[under.site.part_rows].T)

    def delta_weight(self) -> torch.Tensor:
        """Return s·left·right in float32, with `shape`."""
        left, right = (factor.float() for factor in self.factored().load())
        return (self.scaling * (left @ right)).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Product(Loaded):
    """The term W += left · right, with left (rows, k) and right (k, columns).

    `left` is `factor` · diag(`scale`), rounded. What it was made of is kept, for a product of w·s, which no float32
    holds exactly, would cost single elements their last digits where they cancel.
    """

    left: torch.Tensor
    right: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, scale: float, factor: torch.Tensor, right: torch.Tensor) -> Product:
        """Return scale · factor · right."""
        import torch

        scales = torch.full((len(right),), scale, dtype=torch.float64, device=factor.device)
        return cls(factor * scale, right, factor, scales)

    def apply_rows(self, W: torch.Tensor, rows: slice, base: torch.Tensor | None) -> None:
        """Add rows of the product in place: one GEMM, no temporary ΔW."""
        W.addmm_(self.left[rows], self.right)

    def bound(self) -> float:
        """Return a bound on any element of the product: the largest row norm of left times column norm of right."""
        return float(self.left.norm(dim=1).max() * self.right.norm(dim=0).max())

    def gain(self, rows: slice) -> float:
        """Return 1: nothing is scaled after the sum."""
        return 1.0

    def elements(self, W: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return single elements of W + scale·factor·right in float64; `W` are those of the unchanged weight."""
        here = self.left.device
        change = self.factor[rows.to(here)].double() * self.scale * self.right[:, columns.to(here)].T.double()
        return W + change.sum(1).to(W.device)

    def is_zero(self) -> bool:
        """Tell whether no rank has both a column of left and a row of right that are not zero."""
        return not bool((self.left.any(0) & self.right.any(1)).any())

    def plus(self, other: Term) -> Term | None:
        """Return the sum of two products as one, exactly: factors side by side along k."""
        import torch

        if not isinstance(other, Product):
            return None
        return Product(
            torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right]),
            torch.cat([self.factor, other.factor], 1), torch.cat([self.scale, other.scale]),
        )  # fmt: skip
