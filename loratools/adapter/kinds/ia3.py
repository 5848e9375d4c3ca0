"""(IA)³: W' = W∘l, one number for each output feature, or each input (Liu et al. 2022, arXiv 2205.05638).

LyCORIS stores l − 1 as `weight` (n,), or (1, n, 1, 1) of a convolution, and `on_input`, 0 or 1. PEFT stores l itself as
`ia3_l`, (n, 1), (1, n) or (1, n, 1, …), the `layout` says `on_input`, and numbers of outputs scale the bias too. There
is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from loratools.adapter.basis import Basis
from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying, Update
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

WEIGHT_PART, INPUT_PART, FACTORS_PART = "weight", "on_input", "ia3_l"


@dataclass(frozen=True, slots=True, eq=False)
class Ia3Update(OnWeight):
    """The numbers, and whether they are for inputs; the weight's shape is the base's, once that is known.

    Without a `flag` the numbers are PEFT's l, with one they are LyCORIS' l − 1.
    """

    vector: LazyTensor
    flag: LazyTensor | None
    on_input: bool
    weight_shape: tuple[int, ...] | None = None

    kind = "ia3"
    rank = 0
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        count, shape = self.vector.parameters, self.weight_shape
        if count != max(self.vector.shape, default=0):
            raise ValueError(f"(IA)³'s numbers have shape {self.vector.shape}, expected one for each feature")
        if shape is not None and (len(shape) < 2 or shape[int(self.on_input)] != count):
            side = "input" if self.on_input else "output"
            raise ValueError(f"it has {count} numbers for {side} features, the base's weight has shape {shape}")

    def fitted(self, shape: tuple[int, ...]) -> Ia3Update:
        """Return the update of a base weight of this shape, which the numbers alone do not tell."""
        return replace(self, weight_shape=shape)

    @property
    def layout(self) -> Mapping[str, Any]:
        return {} if self.flag else {"on_input": self.on_input}

    @property
    def on_bias(self) -> Update | None:
        """The same numbers on the outputs' bias, in PEFT's kind."""
        if self.flag or self.on_input:
            return None
        return replace(self, weight_shape=(self.vector.parameters, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        count = self.vector.parameters
        return self.weight_shape or ((1, count) if self.on_input else (count, 1))

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {WEIGHT_PART: self.vector, INPUT_PART: self.flag} if self.flag else {FACTORS_PART: self.vector}

    def carried(self, basis: Basis) -> Self:
        """Return itself: factors of rows or columns commute with those of a basis."""
        return self

    def _factors(self, site: Site, weight: float) -> tuple[Tensor, bool]:
        """Return 1 + w·(l − 1) in float64 for rows or columns of the module's own matrix, and whether for columns."""
        numbers = self.vector.load().double().flatten()
        v = 1 + weight * (numbers if self.flag else numbers - 1)
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
    """Tell whether this is a vector and the side that it is for, or PEFT's factors."""
    return parts.keys() in ({WEIGHT_PART, INPUT_PART}, {FACTORS_PART})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> Ia3Update:
    """Return the update; it has no scaling. Raises `ValueError` where nothing says which side it is for."""
    if FACTORS_PART in parts:
        if not layout:
            raise ValueError("nothing says whether its numbers are for inputs or outputs")
        return Ia3Update(parts[FACTORS_PART], None, bool(layout["on_input"]))
    flag = parts[INPUT_PART]
    if flag.parameters != 1:
        raise ValueError(f"{INPUT_PART} has shape {flag.shape}, expected one number")
    return Ia3Update(parts[WEIGHT_PART], flag, bool(flag.load().item()))
