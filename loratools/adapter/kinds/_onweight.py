"""What kinds have in common whose W' is any function of W: where the weight lies, how much of it they need at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._named import NamedTensors
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter

Change = Callable[[Tensor, slice], Tensor]
"""(rows of W as its module defines it, (n, in·…); which rows these are) -> the same rows of W'."""


@dataclass(frozen=True, slots=True, eq=False)
class Changing(NamedTensors, OnWeight):
    """An update W' = f(W) by its tensors.

    A kind gives `rank`, `change`, `outputs`, `own_shape`, and `together` where rows need each other. With a weight w it
    is W + w·(f(W) − W).
    """

    of_base: ClassVar[bool] = False  # f is asked about the unchanged base W₀, and w·(f(W₀) − W₀) is added

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number that the kind calls its rank; 0 where there is none."""

    @property
    def together(self) -> int:
        """Rows of the module's weight that are needed at once: 1, those of a block, or 0 for all."""
        return 1

    @abstractmethod
    def change(self, dtype: DType, device: Device) -> Change:
        """Load what it takes, and return the function f of rows."""

    @abstractmethod
    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·f(W)ᵀ in float64, (k, rows of the site), by another formula than `change`.

        `X` is (k, in·…) and `under.below(X)` is X·Wᵀ. The site has all rows, unless `together` is 1.
        """

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Mapped:
        """Return the term; raise `IncompatibleAdapter` where rows that need each other lie in different weights."""
        whole = site.part == (0, self.shape[0])
        if not whole and self.together != 1:
            raise IncompatibleAdapter(
                f"{site.tensor}: {self.kind} changes outputs together, and the base stores them in several weights"
            )
        alone = site.rows == (0, site.matrix[0], 1)
        aligned = alone and not site.transposed and self.together and self.shape[0] % self.together == 0
        together = self.together if self.together == 1 and not site.transposed else 0
        together = self.together if aligned else together
        finite = all(bool(lazy.load().isfinite().all()) for lazy in self.tensors.values())
        return Mapped(self.change(dtype, device), site, weight, together or site.matrix[0], finite, self.of_base)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ + w·(X·f(W)ᵀ − X·Wᵀ)."""
        now = under.below(X)
        if not self.of_base:
            return now + weight * (self.outputs(X, under) - now)
        W = under.base()
        first = under._replace(below=lambda probes: probes @ W.to(probes).T)
        return now + weight * (self.outputs(X, first) - first.below(X))


@dataclass(frozen=True, slots=True, eq=False)
class Mapped(Term):
    """The term W ← W + w·(f(W) − W), of which `together` rows of the base's tensor come at once."""

    change: Change
    site: Site
    weight: float
    together: int = 1
    finite: bool = True
    of_base: bool = False

    @property
    def needs_base(self) -> bool:
        return self.of_base

    def is_finite(self) -> bool:
        """Tell whether all that it was made of is finite."""
        return self.finite

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        before = W if base is None or not self.of_base else base
        first = self.site.part[0]
        if self.site.transposed:
            after = self.change(before.T, slice(first, first + W.shape[1])).T
        else:
            after = self.change(before, slice(first + rows.start, first + rows.stop))
        if self.weight == 1 and before is W:
            W.copy_(after)
        else:
            W.add_(after.sub(before), alpha=self.weight)
