"""The ways to combine the changes that several adapters make to one module; one file each, found by file name.

A method is a module here with

    SUMMARY    what it does, in one line
    OPTIONS    the names of the options it takes, of `MethodOptions`
    LIKE       the libraries whose numbers it can give instead, where they differ from the paper's
    merge(terms, options, chance)   the combined change: two factors where it is a product, else a dense matrix; None
                                    for the sum of the terms, which keeps factors as they are (`products.py`)

Only `linear` does; `knots` and `core_space` work in a space of Σr dimensions that all share. The
others look at single elements of ΔW and so need one module's matrix, which `_deltas` makes a few rows at a time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from loratools.errors import UnknownName
from loratools.options import either, modules_in, near
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

if TYPE_CHECKING:
    from torch import Tensor


class Merge(Protocol):
    """Combines the changes of one module."""

    def __call__(self, terms: Terms, options: MethodOptions, chance: Chance) -> tuple[Tensor, Tensor] | Tensor:
        """Return the combined change: left (rows, k) and right (k, columns), or the matrix itself."""


class Method(Protocol):
    """A method's module; see the top of this file."""

    SUMMARY: str
    OPTIONS: frozenset[str]
    LIKE: frozenset[str]
    merge: Merge | None


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(modules_in(__path__))


def get(name: str) -> Method:
    """Return a method's module; raise `UnknownName` with the list of those that exist."""
    if name not in names():
        raise UnknownName(f"no method {name!r}; loratools knows {', '.join(names())}{near(name, names())}")
    return cast(Method, import_module(f"{__name__}.{name}"))


def seed_of(name: str, options: MethodOptions) -> int | None:
    """Return the seed of a method that leaves something to chance, 0 where none is given; None for the others."""
    return (options.seed or 0) if "seed" in get(name).OPTIONS else None


def problems(name: str, options: MethodOptions) -> list[str]:
    """Return a sentence about every option that a method does not take, or lacks; or about a name of no method."""
    if name not in names():
        return [f"method is {name!r}; it can be {either(names())}{near(str(name), names())}"]
    method = get(name)
    stated = [option for option in ("density", "gamma", "epsilon", "seed") if getattr(options, option) is not None]
    faults = [f"it takes no {option}" for option in stated if option not in method.OPTIONS]
    if "density" in method.OPTIONS and options.density is None:
        faults.append("it needs a density, the share of elements that it keeps, such as 0.5")
    if options.like is not None and options.like not in method.LIKE:
        faults.append(f"there is no {name} of {options.like} to be like")
    return [f"method {name}: {'; '.join(faults)}"] if faults else []
