"""The kinds of update, one file each, found by file name.

A kind file, called as the kind is in the format's registry, is a module with

    claims(parts)                     whether a module with these part names, and numbers of sides, is of this kind
    build(parts, scaling, alpha)      the `Update`; raises `ValueError` with a sentence where shapes do not fit. A kind
                                      that shapes cannot tell all about takes `layout` besides, a mapping

`parts` maps PEFT's names of a module's tensors (`lora_A.weight`, `lora_B.weight`, …) to lazy tensors. What others ask
of an update is in the protocols here; `Usual` and `Term` have the answers of most. A kind whose ΔW is a product builds
on `_product.LowRank` (two tensors as they are: `TwoFactors`), one that can make ΔW row by row on `_rowwise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratools.adapter.kinds._term import Device, DType, Refinable, Tensor, Term
from loratools.errors import UnknownKind
from loratools.options import modules_in
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.adapter.basis import Basis
    from loratools.adapter.site import Site

__all__ = [
    "ByRows", "DType", "Device", "Factors", "Refinable", "Rows", "Tensor", "Term", "Underlying", "Update", "Usual",
    "claim", "get", "names",
]  # fmt: skip


class Factors(NamedTuple):
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


class Underlying(NamedTuple):
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
    def on_bias(self) -> Update | None:
        """What it does to the module's bias where the base has one, as an update of a weight (out, 1)."""
        return None

    def over(self, weight: Callable[[], Tensor]) -> Update:
        """Return an update of a bias that can read the unchanged weight beside it, (rows of its site, in)."""
        return self  # type: ignore[return-value]

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

    def weighted(self, weight: float) -> Update | None:
        """Return the update whose scaling has the weight of a merge in it; None for a kind with which it cannot."""
        return None

    @property
    def by_rows(self) -> ByRows | None:
        """The update as one that makes single rows of its ΔW; None for kinds that cannot, or need no other way."""
        return None

    @property
    def needs_all(self) -> bool:
        """Whether it depends on the shapes of all weights that its adapter changes, as what VeRA draws does."""
        return False

    def among(self, shapes: Sequence[tuple[int, ...]]) -> Update:
        """Return the update once the shapes of all weights of its adapter are known; asked for if `needs_all`."""
        return self  # type: ignore[return-value]

    def fitted(self, shape: tuple[int, ...]) -> Update:
        """Return the update for a base weight of this shape, which its parts may leave open; `ValueError`: a misfit."""
        return self  # type: ignore[return-value]

    def factored(self) -> Factors | None:
        """Return the factors of ΔW, from shapes alone; None where the change is no such product."""
        return None

    def carried(self, basis: Basis) -> Update:
        """Return what does to a weight in another basis as this does to W; `ValueError` where nothing is known to."""
        raise ValueError("nothing is known that does the same in another basis")

    def with_factors(self, left: LazyTensor, right: LazyTensor, bias: LazyTensor | None = None) -> Update:
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
    return tuple(modules_in(__path__))


@cache
def get(kind: str) -> Any:
    """Return the module of a kind; raise `UnknownKind` with the list of those that exist."""
    if kind not in names():
        raise UnknownKind(f"no kind of update {kind!r}; loratools knows {', '.join(names())}")
    return import_module(f"{__name__}.{kind}")


_MOST_CLAIMS = 1000
_claims: dict[tuple[tuple[str, ...], frozenset[tuple[str, int]]], str | None] = {}


def claim(parts: Mapping[str, LazyTensor]) -> str | None:
    """Return the kind whose parts these are, or None.

    No two kinds claim the same, so the order in which they are asked is free, and one called as a part begins is first.
    Names and numbers of sides are all that `claims` looks at: what was asked once is known.
    """
    signs = names(), frozenset([(name, len(lazy.shape)) for name, lazy in parts.items()])
    if signs not in _claims:
        if len(_claims) >= _MOST_CLAIMS:
            _claims.clear()
        asked = sorted(names(), key=lambda kind: not any(name.startswith(kind) for name in parts))
        _claims[signs] = next((kind for kind in asked if get(kind).claims(parts)), None)
    return _claims[signs]
