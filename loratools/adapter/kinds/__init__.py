"""The kinds of update, one file each, found by file name.

A kind file, called as the kind is in the format's registry, is a module with

    claims(parts)                     whether a module with these part names is of this kind
    build(parts, scaling, alpha)      the `Update`; raises `ValueError` with a sentence where shapes do not fit. A kind
                                      that shapes cannot tell all about takes `layout` besides, a mapping

`parts` maps PEFT's names of a module's tensors (`lora_A.weight`, `lora_B.weight`, …) to lazy tensors. What others ask
of an update is in the protocols here; `Usual` and `Term` have the answers of most. A kind whose ΔW is a product builds
on `_product.LowRank` (two tensors as they are: `TwoFactors`), one that can make ΔW row by row on `_rowwise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from loratools.adapter.basis import Basis
from loratools.adapter.site import Site
from loratools.errors import UnknownKind
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

Tensor: TypeAlias = "torch.Tensor"  # by name: kinds are known, and their updates built, without torch
DType: TypeAlias = "torch.dtype"
Device: TypeAlias = "torch.device"


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A change that is a product: ΔW = scale·left·right of the weight seen as a matrix, first side × all others.

    `left` is (rows, k) and `right` (k, columns), for the weight as its module defines it ((V, d) of an embedding).
    `spec` of either is set where it is exactly bytes of a file. With a `magnitude` m, one number for each row or,
    `by_column`, for each column, w being the adapter's weight in a merge, W' = g∘(W + w·ΔW), g = m/‖W₀ + w·ΔW‖₂.
    """

    left: LazyTensor
    right: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    by_column: bool = False

    def load(self) -> tuple[Tensor, Tensor]:
        """Load left and right, in the dtypes of the file, without the scale."""
        return self.left.load(), self.right.load()


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


@dataclass(frozen=True, slots=True, eq=False)
class Underlying:
    """The weight of a site under an update, for `Update.project`: by its products, or loaded.

    `below(X)` is X·Wᵀ with the weight W that the update finds; updates before it have changed it already, and W is
    taken for zero where all of them are additive. `base` loads the unchanged W₀ of the site as the module defines it,
    (out, in), in float64.
    """

    site: Site
    base: Callable[[], Tensor]
    below: Callable[[Tensor], Tensor]


class Usual(Protocol):
    """What is asked of special kinds only, with the answers of all others, which derive from it."""

    __slots__ = ()

    @property
    def bias(self) -> LazyTensor | None:
        """What is added, times s, to the module's bias (out,): PEFT's `lora_bias`."""
        return None

    @property
    def layout(self) -> Mapping[str, Any]:
        """What the shapes of its parts do not say and `build` has to be told, as JSON values; empty for most kinds."""
        return {}

    @property
    def roles(self) -> Mapping[str, str]:
        """Its parts by what they do beside a running module: `A`, `B`, `magnitude`, and `bias` of B.

        Empty for a kind that acts on a running module through its whole changed weight only.
        """
        return {}

    @property
    def direction(self) -> Update:
        """The update without the rescaling of a kind like DoRA, whose magnitudes it leaves out; most are their own."""
        return self  # type: ignore[return-value]

    @property
    def members(self) -> Sequence[Update]:
        """The updates of which it is a stack, one for each expert, each with sites of its own; empty for most kinds."""
        return ()

    @property
    def readings(self) -> Sequence[Update]:
        """What it may be, where its file leaves that to the base: updates whose layout says all; empty for most."""
        return ()

    @property
    def unsettled(self) -> str:
        """What its file leaves to the base, as the words after "only the base tells"; "" for most kinds."""
        return ""

    def path(self, module: str) -> str:
        """Return the path of what it changes: its module, or the parameter of it that a stack is known to be for."""
        return module

    def stored_in_out(self, is_transposed: bool | None) -> bool | None:
        """Return whether its parameter is stored (in, out), by its file and by what the class says; None if open."""
        return None

    def turned_round(self) -> Update:
        """Return the same change as an update of the transposed weight; a kind that is never asked is its own."""
        return self  # type: ignore[return-value]

    @property
    def replaced_rows(self) -> Sequence[int]:
        """Rows of the weight that it replaces whole, whatever is there: then no weight of a merge can scale it."""
        return ()

    @property
    def by_rows(self) -> ByRows | None:
        """The update as one that makes single rows of its ΔW; None for kinds that cannot, or need no other way."""
        return None

    def fitted(self, shape: tuple[int, ...]) -> Update:
        """Return the update for a base weight of this shape, which its parts may leave open; `ValueError`: a misfit."""
        return self  # type: ignore[return-value]

    def factored(self) -> Factors | None:
        """Return the factors of ΔW, from shapes alone; None where the change is no such product."""
        return None

    def carried(self, basis: Basis) -> Update:
        """Return what does to a weight in another basis as this does to W; `ValueError` where nothing is known to."""
        raise ValueError("nothing is known that does the same in another basis")

    def with_factors(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Update:
        """Return an update of the same weight with ΔW = left·right (as in `Factors`), its alpha the rank, scaling 1.

        `bias` (out,) is added to the module's. Raises `ValueError` for a kind that is not made of two factors alone.
        """
        raise ValueError("an update of this kind is not made of two factors alone")


class Update(Usual, Protocol):
    """A change of one base weight; known by shapes until it is loaded."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """Name of the kind: `lora`, `dora`, …"""

    @property
    def rank(self) -> int:
        """Rank r of the factors."""

    @property
    def alpha(self) -> float:
        """Numerator of the scaling rule, as the file gave it."""

    @property
    def scaling(self) -> float:
        """The number s actually applied to B·A."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes as the module defines it, `(out, in, …)`; a base may store it transposed."""

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """Every tensor of the update under PEFT's name of it."""

    @property
    def additive(self) -> bool:
        """Whether it adds the same ΔW to any W: then the order among such updates means nothing."""

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Term:
        """Load the factors, multiplied by `weight`, for a site."""

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·W'ᵀ for probes X (k, in) in float64, (k, rows of the site), by another path than `term` takes."""

    def delta_weight(self) -> Tensor:
        """Return the dense ΔW in float32 with `shape`, for tests and small work.

        Raises `ValueError` for a kind whose change depends on W.
        """


Rows = Callable[[slice], Tensor]  # rows of a matrix, made when they are asked for


class ByRows(Update, Protocol):
    """An update that is no product of two factors, whose rows of ΔW can be made one tile at a time."""

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Load what it takes, and return the rows of ΔW, or of its transpose, without the scaling."""

    def dense(self) -> Tensor:
        """Return ΔW in float64 as a matrix, without the scaling, by another formula than `rows`."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of all kinds, sorted."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


@cache
def get(kind: str) -> Any:
    """Return the module of a kind; raise `UnknownKind` with the list of those that exist."""
    if kind not in names():
        raise UnknownKind(f"no kind of update {kind!r}; loratools knows {', '.join(names())}")
    return import_module(f"{__name__}.{kind}")


def claim(parts: Mapping[str, LazyTensor]) -> str | None:
    """Return the kind whose parts these are, or None."""
    return next((kind for kind in names() if get(kind).claims(parts)), None)
