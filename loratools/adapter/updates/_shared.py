"""What kinds have in common, whatever their formula: the fields of an update, and what a wrapper passes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from loratools.storage.lazy import LazyTensor


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


class Wrapper:
    """An update around another one, `inner`, whose rank, scaling and shape are its own."""

    __slots__ = ()
    additive = False

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
