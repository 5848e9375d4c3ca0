"""Check options when a value that holds them is built: every wrong word, number and switch is told at once.

A list of words stands in one place, as a `Literal` type; `words` reads it back for messages and command lines.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast, get_args

from loratools.errors import InvalidOption

CheckBase = Literal["strict", "warn", "off"]
"""What happens where a base model is not the recorded one: an error, a warning, or no comparison at all."""

Tied = Literal["error", "untie", "both"]
"""What a change of an embedding does to a head that is the same tensor: refuse, untie the head, or change both."""

Retention = Literal["sample", "full", "off"]
"""On how many tiles the part of the change that survives rounding is measured: a sample, all, none."""

Rounding = Literal["nearest", "stochastic"]
"""How results become numbers of a shorter dtype: to the nearest, ties to even, or up or down at random."""

Quantized = Literal["dequantize", "partial", "requantize", "refuse"]
"""What becomes of a base of codes: all in 16 bit, the changed modules in 16 bit, those made codes again, or nothing."""

TrainedOn = Literal["original", "folded"]
"""Which model an adapter saw, where the base is folded: the model that it was made from, or the base itself."""

Device = Literal["cpu", "cuda", "mps"]
"""Where the arithmetic is done: on the processor, a GPU of NVIDIA or AMD (`cuda:1` is the second), or one of Apple."""

Arithmetic = Literal["auto", "float32"]
"""By what an extraction finds directions: products in bfloat16 where they serve, or in float32 alone."""

_DEVICE = r"cpu|mps|cuda(:(0|[1-9][0-9]?))?"

Value = TypeVar("Value")


def words(literal: Any) -> tuple[str, ...]:
    """Return the words of a `Literal` type, in their order."""
    return get_args(literal)


def modules_in(folders: Iterable[str]) -> list[str]:
    """Return the names of the modules in a package's folders, sorted; those that begin with an underscore are its own.

    `pkgutil` does the same, with an import and a look at every file.
    """
    found: set[str] = set()
    for folder in folders:
        for entry in os.scandir(folder):
            name = entry.name.removesuffix(".py")
            is_module = name != entry.name or ("." not in name and Path(entry, "__init__.py").is_file())
            if is_module and name[0] != "_":
                found.add(name)
    return sorted(found)


def either(choices: Sequence[str]) -> str:
    """Return "a, b or c", an empty text where there is none."""
    *first, last = choices or ("",)
    return f"{', '.join(first)} or {last}" if first else last


def near(name: str, names: Iterable[str], least: float = 0.75) -> str:
    """Return `; did you mean X?` with the nearest name, or nothing.

    `least` is how much of it has to be the same, from 0 to 1. Default: 0.75.

    >>> near("merg", ["merge", "inspect"])
    '; did you mean merge?'
    """
    from difflib import get_close_matches  # only what is wrong needs it

    close = get_close_matches(name, list(names), 1, least)
    return f"; did you mean {close[0]}?" if close else ""


def is_finite(value: object) -> bool:
    """Tell whether a value is a finite number, of any type but bool."""
    try:
        if type(value) in (int, float):
            return math.isfinite(cast(float, value))
        from numbers import Real  # numbers of NumPy and the like

        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


class Options:
    """The options of one call while they are checked, one after another; `done` raises for all that are wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def word(self, name: str, value: object, literal: Any) -> Self:
        """Note a problem unless `value` is one of the words of a `Literal` type."""
        if not isinstance(value, str) or value not in words(literal):
            like = near(value, words(literal)) if isinstance(value, str) else ""
            self.problems.append(f"{name} is {value!r}; it can be {either(words(literal))}{like}")
        return self

    def number(self, name: str, value: object, *, least: int | None = None, optional: bool = False) -> Self:
        """Note a problem unless `value` is a whole number, at least `least`; None passes where it is `optional`."""
        whole = isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
        if not whole and not (optional and value is None):
            range_of = f" of at least {least}" if least is not None else ""
            self.problems.append(f"{name} is {value!r}; it can be a whole number{range_of}{' or None' * optional}")
        return self

    def real(self, name: str, value: object, fits: Callable[[float], bool], which: str) -> Self:
        """Note a problem unless `value` is a finite number that `fits`, or None; `which` says what it can be."""
        if value is not None and not (is_finite(value) and fits(float(cast(float, value)))):
            self.problems.append(f"{name} is {value!r}; it is {which}")
        return self

    def device(self, value: object) -> str:
        """Return a device, a text or torch's object, by its name (`cuda:1`); note a problem where it is none."""
        name = str(value)
        if name != "cpu" and not re.fullmatch(_DEVICE, name):
            self.problems.append(f"device is {value!r}; it can be cpu, cuda, cuda:N or mps")
        return name

    def threads(self, value: object) -> Self:
        """Note a problem unless `value` is a number of threads, or None."""
        return self.number("threads", value, least=1, optional=True)

    def seed(self, name: str, value: object) -> Self:
        """Note a problem unless `value` is a seed that a provenance can hold, from 0 to 2^53 - 1."""
        if type(value) is not int or not 0 <= value < 2**53:
            self.problems.append(f"{name} is {value!r}; it lies between 0 and 2^53 - 1")
        return self

    def flag(self, name: str, value: object) -> Self:
        """Note a problem unless `value` is True or False."""
        if not isinstance(value, bool):
            self.problems.append(f"{name} is {value!r}; it can be True or False")
        return self

    def text(self, name: str, value: object) -> Self:
        """Note a problem unless `value` is a text, or None."""
        if not (value is None or (isinstance(value, str) and value)):
            self.problems.append(f"{name} is {value!r}; it can be a text or None")
        return self

    def parsed(self, name: str, parse: Callable[[Any], Value], value: object) -> Value | None:
        """Return `parse(value)`; note a problem where that raises `ValueError`, whose text says what can be."""
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            return None

    def done(self) -> None:
        """Raise `InvalidOption` if there was a problem: one is the message, several are listed under it."""
        if self.problems:
            single = self.problems[0] if len(self.problems) == 1 else None
            raise InvalidOption(single or f"{len(self.problems)} options are wrong", () if single else self.problems)
