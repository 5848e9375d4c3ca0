"""An update that is loaded and oriented for one place: what changes the rows of a weight, tile by tile."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch

Tensor: TypeAlias = "torch.Tensor"  # by name: kinds are known, and their updates built, without torch
DType: TypeAlias = "torch.dtype"
Device: TypeAlias = "torch.device"


class Term(Protocol):
    """A loaded update, oriented for one site: it changes tiles of rows of the site's rectangle.

    Most are dataclasses of what was loaded that derive from it and have `apply_rows` alone: they change each row by
    itself, whatever the base had there.
    """

    __slots__ = ()

    @property
    def needs_base(self) -> bool:
        """Whether `apply_rows` must be given the unchanged rows, as norms over W + ΔW need them."""
        return False

    @property
    def needs_pass(self) -> bool:
        """Whether `observe_rows` must see all rows before the first is changed: a norm that runs across rows."""
        return False

    @property
    def together(self) -> int:
        """Number of rows that must come in one tile, as those of a rotation's block must; tiles are multiples of it."""
        return 1

    def is_finite(self) -> bool:
        """Tell whether every tensor among the fields is finite, and those of the terms within it."""
        import torch

        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        terms = [value for value in values if hasattr(value, "is_finite")]
        return all(bool(tensor.isfinite().all()) for tensor in tensors) and all(term.is_finite() for term in terms)

    def is_zero(self) -> bool:
        """Tell whether it is certain to change no weight: its ΔW is exactly zero."""
        return False

    def plus(self, other: Term) -> Term | None:
        """Return one term for what this and another of the same site add, as one sum; None where they are no sum."""
        return None

    def observe_rows(self, base: Tensor, rows: slice) -> None:
        """Take in unchanged rows of the rectangle; called once for each tile, in order, if `needs_pass`."""
        return

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        """Change `W`, the tile of `rows` of the rectangle in float32 or float64, in place.

        `base` has the same rows unchanged; it is None where `W` is still unchanged itself.
        """


@runtime_checkable
class Refinable(Term, Protocol):
    """A term whose single results can be computed again in float64, where float32 does not do.

    |W + ΔW| elements far below `bound` have lost digits: the error of a float32 sum is that of its largest term.
    """

    def bound(self) -> float:
        """Return a bound on the magnitude of any element of ΔW."""

    def gain(self, rows: slice) -> float:
        """Return the largest factor that `apply_rows` multiplied the sum with in these rows."""

    def elements(self, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return elements of the result at rows and columns of the rectangle, in float64, from `W`, unchanged ones."""
