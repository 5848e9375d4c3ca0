"""(IA)³: W' = W∘(1 + v), one number v for each output feature, or each input (Liu et al. 2022, arXiv 2205.05638).

As LyCORIS stores it: `weight` (n,), or (1, n, 1, 1) of a convolution, and `on_input`, 0 or 1. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from loratools.adapter.basis import Basis
from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

WEIGHT_PART, INPUT_PART = "weight", "on_input"


@dataclass(frozen=True, slots=True, eq=False)
class Ia3Update(OnWeight):
    """The numbers v, and whether they are for inputs; the weight's shape is the base's, once that is known."""

    vector: LazyTensor
    flag: LazyTensor
    on_input: bool
    weight_shape: tuple[int, ...] | None = None

    kind = "ia3"
    rank = 0
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        count, shape = self.vector.parameters, self.weight_shape
        if count != max(self.vector.shape, default=0):
            raise ValueError(f"(IA)³'s weight has shape {self.vector.shape}, expected one number for each feature")
        if shape is not None and (len(shape) < 2 or shape[int(self.on_input)] != count):
            side = "input" if self.on_input else "output"
            raise ValueError(f"it has {count} numbers for {side} features, the base's weight has shape {shape}")

    def fitted(self, shape: tuple[int, ...]) -> Ia3Update:
        """Return the update of a base weight of this shape, which the numbers alone do not tell."""
        return replace(self, weight_shape=shape)

    @property
    def shape(self) -> tuple[int, ...]:
        count = self.vector.parameters
        return self.weight_shape or ((1, count) if self.on_input else (count, 1))

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {WEIGHT_PART: self.vector, INPUT_PART: self.flag}

    def carried(self, basis: Basis) -> Self:
        """Return itself: factors of rows or columns commute with those of a basis."""
        return self

    def _factors(self, site: Site, weight: float) -> tuple[Tensor, bool]:
        """Return 1 + w·v in float64 for rows or columns of the module's own matrix, and whether for columns."""
        v = 1 + weight * self.vector.load().double().flatten()
        if not self.on_input:
            return v[site.part_rows], False
        columns = site.shape[0] if site.transposed else site.shape[1]
        return v.repeat_interleave(columns // len(v)), True

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Scaling:
        """Return the factors of a site's rows or columns."""
        factors, columns = self._factors(site, weight)
        return Scaling(factors.to(device, dtype), columns != site.transposed)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return (X∘f)·Wᵀ or f∘(X·Wᵀ)."""
        factors, columns = self._factors(under.site, weight)
        return under.below(X * factors.to(X)) if columns else under.below(X) * factors.to(X)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling(Term):
    """The term W *= factors, of rows or of columns."""

    factors: Tensor
    columns: bool

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        W.mul_(self.factors if self.columns else self.factors[rows, None])


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is a vector and the side that it is for."""
    return parts.keys() == {WEIGHT_PART, INPUT_PART}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> Ia3Update:
    """Return the update; it has no scaling."""
    flag = parts[INPUT_PART]
    if flag.parameters != 1:
        raise ValueError(f"{INPUT_PART} has shape {flag.shape}, expected one number")
    return Ia3Update(parts[WEIGHT_PART], flag, bool(flag.load().item()))
