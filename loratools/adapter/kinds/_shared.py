"""What kinds have in common, whatever their formula: the fields of an update, and what a wrapper passes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


class Additive(ABC):
    """An update that adds s·ΔW to the weight."""

    __slots__ = ()
    additive = True

    kind: str
    scaling: float
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank by which alpha is divided; 0 where there is none."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as the module defines it."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, LazyTensor]:
        """Every tensor of the update under its name."""

    @property
    def bias(self) -> LazyTensor | None:
        """What is added, times s, to the module's bias."""
        return None


class OnWeight:
    """An update whose change depends on the weight it finds: no ΔW stands for it, and the order counts."""

    __slots__ = ()
    additive = False

    kind: str

    @property
    def bias(self) -> LazyTensor | None:
        """Nothing is added to the module's bias."""
        return None

    def delta_weight(self) -> torch.Tensor:
        """Raise `ValueError`: the change depends on W."""
        raise ValueError(f"the change that {self.kind} makes depends on the base weight; there is no ΔW without it")


class RowByRow:
    """A term that changes each row by itself, whatever the base had there."""

    __slots__ = ()
    needs_base = False
    needs_pass = False

    def observe_rows(self, base: torch.Tensor, rows: slice) -> None:
        """Nothing to see: rows do not depend on each other, nor on the unchanged base."""


class Wrapper(OnWeight):
    """An update around another one, `inner`, whose rank, scaling and shape are its own."""

    __slots__ = ()

    inner: Any

    @property
    def rank(self) -> int:
        """Rank of the inner update."""
        rank: int = self.inner.rank
        return rank

    @property
    def alpha(self) -> float:
        """Alpha of the inner update."""
        alpha: float = self.inner.alpha
        return alpha

    @property
    def scaling(self) -> float:
        """Scaling of the inner update."""
        scaling: float = self.inner.scaling
        return scaling

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as the module defines it."""
        shape: tuple[int, ...] = self.inner.shape
        return shape
