"""The ways to combine the changes that several adapters make to one module; one file each, found by file name.

A method is a module here with

    SUMMARY    what it does, in one line
    OPTIONS    the names of the options it takes, of `Options`
    LIKE       the libraries whose numbers it can give instead, where they differ from the paper's
    merge(terms, options, chance)   the combined change: two factors where it is a product, else a dense matrix

Only `linear` keeps factors as they are; `knots` and `core_space` work in a space of Σr dimensions that all share. The
others look at single elements of ΔW and so need one module's matrix, which `_deltas` makes a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol, cast

from loratools.errors import LoraToolsError, UnknownKind

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.surgery.methods._chance import Chance


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's change of a module: weight · left · right, with the scaling in `left` (rows, r), both float64.

    `identity` tells it from the others wherever chance is used: digest of the adapter, and the module's name.
    """

    weight: float
    left: Tensor
    right: Tensor
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What methods can be told; each takes some (its `OPTIONS`), and refuses the rest where it is not the default.

    `density`  share of elements that are kept, above 0 and at most 1
    `gamma`    share of the largest elements that `breadcrumbs` drops
    `epsilon`  how far `della` lets the chance of keeping an element lie from the density, to both sides
    `seed`     of every draw
    `like`     the library whose numbers are wanted where a method differs: `peft`
    """

    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    seed: int | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise LoraToolsError(f"density is a share of elements, above 0 and at most 1, not {self.density}")
        if self.gamma is not None and not 0 <= self.gamma < 1:
            raise LoraToolsError(f"gamma is a share of elements, at least 0 and below 1, not {self.gamma}")
        if self.seed is not None and not 0 <= self.seed < 2**53:
            raise LoraToolsError(f"a seed lies between 0 and 2^53 - 1, not {self.seed}")


class Method(Protocol):
    """A method's module; see the top of this file."""

    SUMMARY: str
    OPTIONS: frozenset[str]
    LIKE: frozenset[str]

    def merge(self, terms: Sequence[Term], options: Options, chance: Chance) -> tuple[Tensor, Tensor] | Tensor:
        """Return the combined change of one module: left (rows, k) and right (k, columns), or the matrix itself."""
        ...


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


def get(name: str) -> Method:
    """Return a method's module; raise `UnknownKind` with the list of those that exist."""
    if name not in names():
        raise UnknownKind(f"no method {name!r}; loratools knows {', '.join(names())}")
    return cast(Method, import_module(f"{__name__}.{name}"))


def seed_of(name: str, options: Options) -> int | None:
    """Return the seed of a method that leaves something to chance, 0 where none is given; None for the others."""
    return (options.seed or 0) if "seed" in get(name).OPTIONS else None


def check(name: str, options: Options) -> None:
    """Raise `LoraToolsError` with every option that a method does not take, or lacks."""
    method, problems = get(name), []
    for option in ("density", "gamma", "epsilon", "seed"):
        if getattr(options, option) is not None and option not in method.OPTIONS:
            problems.append(f"it takes no {option}")
    if "density" in method.OPTIONS and options.density is None:
        problems.append("it needs a density, the share of elements that it keeps, such as 0.5")
    if options.like is not None and options.like not in method.LIKE:
        problems.append(f"there is no {name} of {options.like} to be like")
    if problems:
        raise LoraToolsError(f"method {name}: {'; '.join(problems)}")
