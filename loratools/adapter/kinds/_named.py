"""What kinds have in common that keep tensors by name, and those of them whose ΔW is a product of two factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self

from loratools.adapter.kinds import Factors, Tensor, Underlying
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class NamedTensors(ABC):
    """Tensors under their names in files, with what these do not say as `layout`, and the weight's shape once known.

    A kind gives `own_shape`, and in `check` what its tensors have to be.
    """

    tensors: Mapping[str, LazyTensor]
    scaling: float = 1.0
    alpha: float = 1.0
    layout: Mapping[str, Any] = field(default_factory=dict)
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for tensors that do not fit each other, or the base's weight."""
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for tensors that do not fit each other; asked again once the weight's shape is known."""
        fits_shape(self.own_shape, self.weight_shape)

    @property
    @abstractmethod
    def own_shape(self) -> tuple[int, ...]:
        """The weight's shape as far as the tensors tell it, 0 for a side that they leave open."""

    def fitted(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a base weight of this shape, which the tensors alone may not tell."""
        return replace(self, weight_shape=shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or tuple(side or 1 for side in self.own_shape)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return self.tensors

    def number(self, name: str) -> Tensor:
        """Load a tensor in float64."""
        return self.tensors[name].load().double()


@dataclass(frozen=True, slots=True, eq=False)
class NamedProduct(NamedTensors, LowRank):
    """An update s·left·right by its tensors.

    A kind gives `rank`, `own_shape`, `left`, `right` and `dense`, and `width` where left has other than `rank` columns.
    Where the tensors leave a side of the weight open, as shared ones do, there are no factors until a base fits it.
    """

    @property
    def width(self) -> int:
        """Columns of left, rows of right."""
        return self.rank

    @abstractmethod
    def left(self) -> Tensor:
        """Return the left factor (out, width) in float64, without the scaling."""

    @abstractmethod
    def right(self) -> Tensor:
        """Return the right factor (width, in·…) in float64."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ΔW in float64 as a matrix, without the scaling, by another formula than `left` and `right`."""

    @property
    def unsettled(self) -> str:
        return "" if self.weight_shape or all(self.own_shape) else "the shape of its weight"

    def factored(self) -> Factors | None:  # type: ignore[override]
        """Return left and right; None while a side of the weight is open."""
        if self.unsettled or self.needs_all:
            return None
        out, columns = self.shape[0], prod(self.shape[1:])
        source = next(iter(self.tensors.values()))
        left = LazyTensor("F64", (out, self.width), self.left, file=source.file)
        return Factors(left, LazyTensor("F64", (self.width, columns), self.right, file=source.file), self.scaling)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ + w·s·X·ΔWᵀ."""
        return under.below(X) + weight * self.scaling * (X @ self.dense().to(X)[under.site.part_rows].T)


def fits_shape(own: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    """Raise `ValueError` where the base's shape is another one than the tensors tell; 0 is a side that they do not.

    A shape of two sides may be that of a flattened kernel.
    """
    if shape is None:
        return
    base = (shape[0], prod(shape[1:])) if len(own) == 2 and len(shape) > 2 else shape
    if len(own) != len(base) or any(a not in (0, b) for a, b in zip(own, base, strict=True)):
        told = ", ".join(str(side or "?") for side in own)
        raise ValueError(f"its delta weight has shape ({told}), the base's weight has shape {shape}")
