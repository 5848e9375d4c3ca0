"""What kinds have in common whose ΔW is no product of two factors, but whose rows can be made one tile at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Self

from loratools.adapter import kinds
from loratools.adapter.basis import Basis, along, made
from loratools.adapter.kinds import Device, DType, Rows, Tensor, Term, Underlying, Update
from loratools.adapter.kinds._shared import Additive
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor


class Rowwise(Additive):
    """An update s·ΔW of the weight seen as a matrix, first side × all others, that makes rows of ΔW by themselves."""

    __slots__ = ()

    @property
    def by_rows(self) -> Self:
        return self

    def fitted(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a base weight of this shape, where its numbers lie in the same order.

        Flat factors do not tell the sides of a kernel, and PEFT's core of a Conv1d has a side of 1 more.
        """
        own = self.shape
        flat = len(own) == 2 and len(shape) > 2 and own == (shape[0], prod(shape[1:]))
        same = flat or (len(shape) == 3 and own == (*shape, 1))
        return replace(self, weight_shape=shape) if same else self  # type: ignore[type-var]

    @abstractmethod
    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Load what it takes, and return the rows of ΔW, or of its transpose, without the scaling."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ΔW in float64 as a matrix, without the scaling, by another formula than `rows`."""

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Added:
        """Return w·s·ΔW of a site."""
        made = self.rows(dtype, device, site.transposed)
        first, last, *_ = site.part
        if site.transposed:
            return Added(lambda rows: made(rows)[:, first:last], weight * self.scaling)
        return Added(lambda rows: made(slice(first + rows.start, first + rows.stop)), weight * self.scaling)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ + w·s·X·ΔWᵀ."""
        return under.below(X) + weight * self.scaling * (X @ self.dense().to(X)[under.site.part_rows].T)

    def carried(self, basis: Basis) -> Update:
        """Return the whole difference diag(rows)·s·ΔW·diag(columns), which has no such factors: kind `full`."""
        source = next(iter(self.parts.values()))
        whole = made(self.shape, lambda: (self.scaling * self.dense()).reshape(self.shape), source, double=True)
        whole = along(along(whole, basis.rows, 0), basis.columns, 1)
        full: Update = kinds.get("full").build({"diff": made(self.shape, whole.load, source)}, 1.0, 1.0)
        return full

    def delta_weight(self) -> Tensor:
        """Return s·ΔW in float32, with `shape`."""
        return (self.scaling * self.dense()).float().reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Named(Rowwise):
    """One that keeps its tensors by the names they have in files; flat factors learn the weight's shape from a base."""

    tensors: Mapping[str, LazyTensor]
    scaling: float
    alpha: float
    weight_shape: tuple[int, ...] | None = None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return self.tensors

    def weighted(self, weight: float) -> Update | None:
        """Return the update with the scaling times the weight."""
        return replace(self, scaling=self.scaling * weight)


@dataclass(frozen=True, slots=True, eq=False)
class Added(Term):
    """The term W += scale·rows."""

    made: Rows
    scale: float

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        W.add_(self.made(rows), alpha=self.scale)
