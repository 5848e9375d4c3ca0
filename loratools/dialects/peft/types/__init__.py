"""PEFT's types beside LORA, one file each, named as the `peft_type` is in lower case.

A file says what PEFT 0.21 writes for its type, and makes the update of a module from it:

    PARTS        part -> what it is: the tensors of a module, by their names in a file. `{n}` stands for
                 a number, `{word}` for a segment
    SHARED       the same of tensors that all modules share, `base_model.NAME` in a file; optional
    FIELDS       field of the config -> `Field`: what decides the result
    HARMLESS     field -> why it has no effect on a merge
    REFUSED      field -> (which values are refused, why); optional
    notes(fields)
                 sentences that a user must know of a config; optional
    PLACE        where the update of a `{module}` lies if not on its weight, as `{module}.bias`; optional
    TIED         whether modules that are tied to a target have its tensors too, without being targeted; optional
    RENAMED      part of the update -> its name in a file, where they differ; optional
    stored(module, update)
                 the tensors of an update under their names in a file, where those are not just the parts', with `KIND`,
                 the kind of updates that there are; optional
    update(one)  the `Update` of a module; `ValueError` with a sentence where tensors and config do not go together
    updates(one) module -> `Update` for a file that names no module; optional
    whole(one)   in its place, for a type that replaces tensors: name of a parameter of the module -> what takes its
                 place; `WHOLE` is what stands before such a name in a file

What a kind of update does to a weight is in `adapter/kinds/`. Types that cannot be merged are in `_refused.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from loratools.adapter.kinds import Update
from loratools.dialects._frame.numbers import is_number
from loratools.options import modules_in
from loratools.storage.lazy import LazyTensor

Test = Callable[[Any], bool]

ALPHAS = ("alpha", "lora_alpha", "randlora_alpha", "psoft_alpha")
"""What the numerator of a type's scaling is called."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a config: a test of a value that is there, what was expected, and PEFT's default."""

    test: Test
    expected: str
    default: Any = None


class Values(dict[str, Any]):
    """The fields that a config states; where it does not, PEFT's default, of which `taken` keeps those that decided."""

    def __init__(self, fields: Mapping[str, Any], own: Mapping[str, Field]) -> None:
        """Make them of what a config states and the fields of its type."""
        super().__init__(fields)
        self._own = own
        self.taken: dict[str, Any] = {}

    def __missing__(self, field: str) -> Any:
        """Return the default of a field; it decided nothing where it is what no one asks for: 0, off or none."""
        default = self._own[field].default
        if default:
            self.taken[field] = default
        return default


@dataclass(frozen=True, slots=True)
class Order:
    """`shapes`, (out, in) by module in the order of the code, and the float `dtype` of most of the base's matrices."""

    shapes: Mapping[str, tuple[int, int]]
    dtype: str


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """What a file has of one module: its `parts`, the tensors that all modules share, and the config.

    `modules` are all modules of the file in its order. `values` are the config's fields, `pattern` returns the value
    that a pattern has for this module, by PEFT's first-match rule. `order(why)` returns the modules that the
    config targets in the order of the model's code, which the base tells; `why` says what needs it.
    `names(field, module)` tells whether the names, or the regular expression, in a field are for a module.
    """

    module: str
    parts: Mapping[str, LazyTensor]
    shared: Mapping[str, LazyTensor]
    modules: Sequence[str]
    values: Mapping[str, Any]
    pattern: Callable[[str, str], Any]
    order: Callable[[str], Order]
    names: Callable[[str, str], bool]

    def __getitem__(self, field: str) -> Any:
        """Return the value of a field, or PEFT's default."""
        return self.values[field]

    def named(self, field: str) -> bool:
        """Tell whether the names, or the regular expression, in a field are for this module."""
        return self.names(field, self.module)

    def by_pattern(self, field: str, pattern: str) -> Any:
        """Return the value that `pattern` has for this module, else that of `field`."""
        value = self.pattern(pattern, self.module)
        return self.values[field] if value is None else value

    def of_rank(self, built: Update, pattern: str = "") -> Update:
        """Return an update; raise `ValueError` where its rank is not that of `r`, by the pattern where one is named."""
        rank = self.by_pattern("r", pattern) if pattern else self["r"]
        if built.rank != rank:
            raise ValueError(f"its tensors have rank {built.rank}, the config says {rank}")
        return built

    def has(self, *names: str) -> None:
        """Raise `ValueError` with the parts that are missing."""
        if missing := [name for name in names if name not in self.parts and name not in self.shared]:
            raise ValueError(f"no {', '.join(missing)}; found {', '.join(sorted(self.parts)) or 'nothing'}")


def a_rank(value: Any) -> bool:
    """Tell whether a value is a whole number above zero."""
    return type(value) is int and 0 < value < 2**31


def a_count(value: Any) -> bool:
    """Tell whether a value is a whole number, zero or above."""
    return type(value) is int and 0 <= value < 2**63


def a_switch(value: Any) -> bool:
    """Tell whether a value is true or false."""
    return type(value) is bool


def one_of(*words: str) -> Test:
    """Return a test for one of these words."""
    return lambda value: value in words


def to_numbers(value: Any) -> bool:
    """Tell whether a value maps names to numbers."""
    return isinstance(value, dict) and all(is_number(each) for each in value.values())


RANK = Field(a_rank, "a rank above zero", 8)
SWITCH = Field(a_switch, "a switch", False)
PATTERN = Field(to_numbers, "names to numbers", {})


def number(default: float) -> Field:
    """Return a field that holds a number."""
    return Field(is_number, "a number", default)


def count(default: int | None) -> Field:
    """Return a field that holds a whole number, zero or above."""
    return Field(a_count, "a whole number", default)


def rank(default: int) -> Field:
    """Return a field that holds a rank."""
    return Field(a_rank, "a rank above zero", default)


@cache
def names() -> tuple[str, ...]:
    """Return the types that are read here, as `peft_type` spells them, sorted."""
    return tuple(name.upper() for name in modules_in(__path__))


@cache
def get(peft_type: str) -> Any:
    """Return the module of a type; raise `KeyError` where there is none."""
    if peft_type not in names():
        raise KeyError(peft_type)
    return import_module(f"{__name__}.{peft_type.lower()}")
