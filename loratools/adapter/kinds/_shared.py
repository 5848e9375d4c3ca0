"""What kinds have in common, whatever their formula: a ΔW that is added, or a change of what is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from loratools.adapter.kinds import Tensor, Usual
from loratools.storage.lazy import LazyTensor


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

    def delta_weight(self) -> Tensor:
        """Raise `ValueError`: the change depends on W."""
        raise ValueError(f"the change that {self.kind} makes depends on the base weight; there is no ΔW without it")
