"""What kinds have in common, whatever their formula: a ΔW that is added, or a change of what is there, or a wrapper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from loratools.adapter import kinds
from loratools.adapter.kinds import Tensor, Update, Usual
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


@dataclass(frozen=True, slots=True, eq=False)
class Wrapper(OnWeight):
    """An update around another one, whose rank, scaling and shape are its own, with magnitudes of features.

    A kind says by `part` what the magnitudes are called, and by `around` the kinds that can stand within.
    """

    inner: Update
    magnitude: LazyTensor

    part: ClassVar[str]
    around: ClassVar[tuple[str, ...]]

    @property
    def direction(self) -> Update:
        return self.inner

    @property
    def bias(self) -> LazyTensor | None:
        return self.inner.bias

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def alpha(self) -> float:
        return self.inner.alpha

    @property
    def scaling(self) -> float:
        return self.inner.scaling

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {**self.inner.parts, self.part: self.magnitude}

    @classmethod
    def claims(cls, parts: Mapping[str, LazyTensor]) -> bool:
        """Tell whether these are magnitudes beside the factors of another kind."""
        return cls.part in parts and cls._within(parts)[0] is not None

    @classmethod
    def build(cls, parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> Self:
        """Return the update of factors and magnitudes."""
        kind, rest = cls._within(parts)
        return cls(kinds.get(str(kind)).build(rest, scaling, alpha), parts[cls.part])

    @classmethod
    def _within(cls, parts: Mapping[str, LazyTensor]) -> tuple[str | None, dict[str, LazyTensor]]:
        rest = {part: lazy for part, lazy in parts.items() if part != cls.part}
        return next((kind for kind in cls.around if kinds.get(kind).claims(rest)), None), rest
