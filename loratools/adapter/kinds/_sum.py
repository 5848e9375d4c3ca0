"""The sum that most kinds come to once they are loaded, W += left · right: the kinds are known and read without it."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter.kinds import Tensor, Term


@dataclass(frozen=True, slots=True, eq=False)
class Product(Term):
    """The term W += left · right, with left (rows, k) and right (k, columns).

    `left` is `factor` · diag(`scale`), rounded. What it was made of is kept, for a product of w·s, which no float32
    holds exactly, would cost single elements their last digits where they cancel.
    """

    left: Tensor
    right: Tensor
    factor: Tensor
    scale: Tensor

    @classmethod
    def of(cls, scale: float, factor: Tensor, right: Tensor) -> Product:
        """Return scale · factor · right."""
        import torch

        scales = torch.full((len(right),), scale, dtype=torch.float64, device=factor.device)
        return cls(factor * scale, right, factor, scales)

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        """Add rows of the product in place: one GEMM, no temporary ΔW."""
        W.addmm_(self.left[rows], self.right)

    def bound(self) -> float:
        """Return a bound on any element of the product: the largest row norm of left times column norm of right."""
        return float(self.left.norm(dim=1).max() * self.right.norm(dim=0).max())

    def gain(self, rows: slice) -> float:
        """Return 1: nothing is scaled after the sum."""
        return 1.0

    def elements(self, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return single elements of W + scale·factor·right in float64; `W` are those of the unchanged weight."""
        device = self.left.device
        change = self.factor[rows.to(device)].double() * self.scale * self.right[:, columns.to(device)].T.double()
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
