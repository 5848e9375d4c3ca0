"""What kinds have in common, whatever their formula: answers to what is asked of special kinds only, and wrapping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

    from loratools.adapter.kinds import Factors, Term


class Usual:
    """An update that is no stack and no product, replaces no rows, and whose parts tell its shape."""

    __slots__ = ()

    kind: str

    @property
    def bias(self) -> LazyTensor | None:
        """What is added, times s, to the module's bias: nothing."""
        return None

    @property
    def layout(self) -> Mapping[str, Any]:
        """What the shapes do not say: nothing."""
        return {}

    @property
    def direction(self) -> Any:
        """The update itself: it holds no magnitudes."""
        return self

    @property
    def members(self) -> Sequence[Any]:
        """The updates that it stacks: none."""
        return ()

    @property
    def replaced_rows(self) -> Sequence[int]:
        """The rows that it replaces whole: none."""
        return ()

    @property
    def by_rows(self) -> Any:
        """The update as one that makes single rows: None."""
        return None

    def fitted(self, shape: tuple[int, ...]) -> Any:
        """Return the update as it is: its parts tell the shape."""
        return self

    def factored(self) -> Factors | None:
        """Return None: the change is no product."""
        return None

    def with_factors(self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """Raise `ValueError`: it is not made of two factors alone."""
        raise ValueError(f"kind {self.kind} is not made of two factors alone")


class Additive(Usual, ABC):
    """An update that adds s·ΔW to the weight."""

    __slots__ = ()
    additive = True

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

    def delta_weight(self) -> torch.Tensor:
        """Raise `ValueError`: the change depends on W."""
        raise ValueError(f"the change that {self.kind} makes depends on the base weight; there is no ΔW without it")


class Loaded:
    """A term, as a dataclass of what was loaded, that changes each row by itself, whatever the base had there."""

    __slots__ = ()
    needs_base = False

    @property
    def needs_pass(self) -> bool:
        """Whether all rows must be seen before the first is changed: no."""
        return False

    @property
    def together(self) -> int:
        """Number of rows that must come in one tile: one."""
        return 1

    def is_finite(self) -> bool:
        """Tell whether every tensor among the fields is finite, and those of the terms within it."""
        import torch

        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
                return False
            if isinstance(value, Loaded) and not value.is_finite():
                return False
        return True

    def is_zero(self) -> bool:
        """Return False: to tell would take the base."""
        return False

    def plus(self, other: Term) -> Term | None:
        """Return None: it is no sum with another."""
        return None

    def observe_rows(self, base: torch.Tensor, rows: slice) -> None:
        """Nothing to see: rows do not depend on each other, nor on the unchanged base."""


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
