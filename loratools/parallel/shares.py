"""Parts of a whole, counted from 1, of about equal size: the same for everybody who knows the sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Self

from loratools.errors import InvalidOption

MOST = 65535
"""Parts of one result, at most; far beyond what a scheduler gives one user."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One part of `of`, as `--part 3/16` says it: `number` counts from 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MOST:
            raise InvalidOption(f"part is {self}; it can be one of 1/{self.of} to {self.of}/{self.of}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the part that a text such as "3/16" names; raise `InvalidOption` for any other.

        Example:
            >>> Part.parse("3/16")
            Part(number=3, of=16)
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not match or not 1 <= int(match[2]) <= MOST:
            raise InvalidOption(f"part is {text!r}; it can be a number and how many there are, such as '3/16'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def balanced(sizes: Mapping[str, int], of: int) -> list[tuple[str, ...]]:
    """Return the names of each of `of` parts: the largest first, each to the part that has least so far.

    No part is larger than 4/3 of the best division's largest (Graham 1969, longest processing time first). What is of
    equal size is taken by name, so that everybody comes to the same parts. Within a part the largest is first.

    Example:
        >>> balanced({"a": 5, "b": 4, "c": 3, "d": 3}, 2)
        [('a', 'd'), ('b', 'c')]
    """
    parts: list[list[str]] = [[] for _ in range(of)]
    loads = [(0, number) for number in range(of)]
    heapify(loads)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = loads[0]
        parts[number].append(name)
        heapreplace(loads, (load + sizes[name], number))
    return [tuple(names) for names in parts]
