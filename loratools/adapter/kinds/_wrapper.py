"""An update around another one, with magnitudes of features: what the kinds of DoRA have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds._shared import OnWeight
from loratools.storage.lazy import LazyTensor


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
