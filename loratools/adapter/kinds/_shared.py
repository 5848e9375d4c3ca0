"""What kinds have in common, whatever their formula: a ΔW that is added, or a change of what is there, or a wrapper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Usual
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


class Additive(Usual, ABC):
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


class OnWeight(Usual):
    """An update whose change depends on the weight it finds: no ΔW stands for it, and the order counts."""

    __slots__ = ()
    additive = False

    kind: str

    def delta_weight(self) -> torch.Tensor:
        """Raise `ValueError`: the change depends on W."""
        raise ValueError(f"the change that {self.kind} makes depends on the base weight; there is no ΔW without it")


class Wrapper(OnWeight):
    """An update around another one, `inner`, whose rank, scaling and shape are its own."""

    __slots__ = ()

    inner: Any

    @property
    def direction(self) -> Any:
        """The inner update: without the magnitudes."""
        return self.inner

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
