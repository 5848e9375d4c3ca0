"""How each type of module computes with adapters, one file a type, found by file name.

A type's file is a module with

    SITE             the subclass of `Site` that is mixed over a module's class
    KIND             the kind of update that is a product on such a module
    NAMES            PEFT's names of its factors A and B
    ZERO             which of the two is zero when training starts
    claims(module)   whether modules like this one are of the type
    shape(module)    shape of its weight as the module defines it, (out, in, …); an embedding's is (V, d)
    sides(module)    the sides that the factors share with it: A is (r, *sides[1:]), B is (sides[0], r, 1…)
    matrix(module)   its weight as the matrix that B·A is like, a view; None where it is stored as codes

    linear      nn.Linear, and what computes like one: quantized layers, (out, in)
    conv1d      transformers' Conv1D, which stores (in, out)
    embedding   nn.Embedding
    conv        nn.Conv1d, nn.Conv2d, nn.Conv3d
    whole       any other module: an adapter's tensors stand for its parameters while it runs

`_affine.py` has what linear layers share; `_slices.py` joins factors on slices of a fused weight, as if of the whole.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from loratools.live.site import Site
from loratools.options import modules_in


class ModuleType(Protocol):
    """A file of this folder."""

    SITE: type[Site]
    KIND: str
    NAMES: tuple[str, str]
    ZERO: str

    def claims(self, module: nn.Module) -> bool:
        """Tell whether a module is of this type; raise `IncompatibleAdapter` for one that cannot have factors."""
        ...

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Return the shape of its weight as the module defines it, also where it is stored as codes."""
        ...

    def sides(self, module: nn.Module) -> tuple[int, ...]:
        """Return the number of outputs, and what A has beside its rank."""
        ...

    def matrix(self, module: nn.Module) -> Tensor | None:
        """Return the weight as the matrix that B·A is like."""
        ...


@cache
def types() -> tuple[Any, ...]:
    """Return the files of all types of modules that factors act beside, sorted by name."""
    names = modules_in(__path__)
    return tuple(import_module(f"{__name__}.{name}") for name in names if name != "whole")


def type_of(module: nn.Module) -> ModuleType | None:
    """Return the type of a module; None for one that is of type `whole`."""
    return next((each for each in types() if each.claims(module)), None)


def site_of(module: nn.Module) -> type[Site]:
    """Return what is mixed over a module's class."""
    known = type_of(module)
    site: type[Site] = known.SITE if known else import_module(f"{__name__}.whole").SITE
    return site
