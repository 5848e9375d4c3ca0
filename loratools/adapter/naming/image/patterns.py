"""Patterns of module names, in which `{}` stands for a number: which of many a name fits, and with which numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

_NUMBER = re.compile(r"\d+|\{\}")
_Mask = tuple[bool, ...]


def form_of(name: str) -> str:
    """Return a name with `{}` in the place of each number.

    >>> form_of("blocks.12.ffn.0")
    'blocks.{}.ffn.{}'
    """
    return _NUMBER.sub("{}", name)


def forms_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return form -> the names of that form.

    >>> forms_of(["blocks.1.ffn", "blocks.2.ffn"])
    {'blocks.{}.ffn': ['blocks.1.ffn', 'blocks.2.ffn']}
    """
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(_parted(name)[0], []).append(name)
    return forms


class Patterns:
    """Many patterns, of which a name is looked up in a few steps.

    Numbers that a pattern spells out are literal: `norm1` fits `norm1` only, `blocks.7.norm1` fits `blocks.{}.norm1`.
    """

    def __init__(self, patterns: Iterable[str], *, flat: bool = False) -> None:
        """Take the patterns; `flat` ones are found by names with `_` for every `.`, as kohya writes them."""
        # form, with {} for every number -> which numbers are open -> the others -> pattern
        self._forms: dict[str, dict[_Mask, dict[tuple[str, ...], str]]] = {}
        for pattern in patterns:
            spelled = pattern.replace(".", "_") if flat else pattern
            numbers = _NUMBER.findall(spelled)
            masks = self._forms.setdefault(_NUMBER.sub("{}", spelled), {})
            literal = tuple(number for number in numbers if number != "{}")
            masks.setdefault(tuple(number == "{}" for number in numbers), {}).setdefault(literal, pattern)

    def has_any(self, forms: Iterable[str]) -> bool:
        """Tell whether any pattern is of one of these forms, as `form_of` says them: other names fit none."""
        return not self._forms.keys().isdisjoint(forms)

    def count(self, by_form: Mapping[str, Sequence[str]]) -> int:
        """Return how many names fit any pattern, of names by their forms as `forms_of` has them."""
        return sum(1 for form in self._forms.keys() & by_form.keys() for name in by_form[form] if self.find(name))

    def find(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Return a pattern that a name fits, with the numbers in the places of its `{}`; None without one.

        >>> Patterns(["blocks.{}.ffn.0"]).find("blocks.12.ffn.0")
        ('blocks.{}.ffn.0', ('12',))
        """
        form, numbers = _parted(name)
        for mask, patterns in self._forms.get(form, {}).items():
            pattern = patterns.get(tuple(number for number, is_open in zip(numbers, mask, strict=True) if not is_open))
            if pattern is not None:
                return pattern, tuple(number for number, is_open in zip(numbers, mask, strict=True) if is_open)
        return None


@lru_cache(maxsize=1 << 15)  # the same names are looked up in every family, and when a base is opened again
def _parted(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the form of a name, and its numbers."""
    return _NUMBER.sub("{}", name), tuple(_NUMBER.findall(name))
