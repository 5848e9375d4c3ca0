"""Regular expressions from strangers, matched in bounded time.

Python's matcher tries one path after the other: fifteen `.*` in a row take it longer than anyone waits. Here all paths
go together: what is kept is the set of places that the text could be matched up to, so each part of the expression
looks at each place at most a few times. Only whether a text matches is told, which is the same for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from loratools.errors import UnsupportedAdapter

STEPS = 100_000
"""Places looked at for one text; what trainers write takes a few thousand."""

# With so few choices and so short a text, Python's matcher is quick whatever the expression, and it is the faster one.
_FEW, _SHORT = 3, 256

_CATEGORIES: dict[Any, str] = {
    op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_SPACE: r"\s", op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_BOUNDARY, _NO_BOUNDARY = re.compile(r"\b"), re.compile(r"\B")
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_STRING = "string"
_LOOKS = (op.ASSERT, op.ASSERT_NOT)


def matches(pattern: str, text: str, *, whole: bool) -> bool:
    """Tell what `re.fullmatch` (`whole`) or `re.match` would tell.

    Raises `ValueError` for an expression that cannot be used, `UnsupportedAdapter` for one that takes too many steps.
    """
    expression = _parsed(pattern)
    if expression.choices <= _FEW and len(text) <= _SHORT:
        return (expression.python.fullmatch if whole else expression.python.match)(text) is not None
    ends = _Run(text, pattern, bool(expression.python.flags & re.IGNORECASE)).sequence(expression.nodes, {0})
    return len(text) in ends if whole else bool(ends)


class _Expression:
    """An expression that was parsed and found usable."""

    def __init__(self, pattern: str) -> None:
        self.python = re.compile(pattern)
        parsed = parser.parse(pattern)
        self.choices = 0
        self._look(parsed, 0)
        self.nodes = _joined(parsed, bool(self.python.flags & re.IGNORECASE))
        if self.python.flags & (re.MULTILINE | re.LOCALE | re.DOTALL | re.ASCII):
            raise ValueError(f"{pattern[:80]!r} sets flags that no trainer sets")

    def _look(self, nodes: Iterable[Any], looks: int) -> None:
        for code, argument in nodes:
            if code is op.BRANCH:
                self.choices += 1
                for branch in argument[1]:
                    self._look(branch, looks)
            elif code in _REPEATS:
                before = self.choices
                self._look(argument[2], looks)
                # What varies and is repeated can vary each time.
                self.choices = before + (self.choices - before) * (_FEW + 1) + (argument[0] != argument[1])
            elif code is op.SUBPATTERN:
                if argument[1] or argument[2]:
                    raise ValueError("it sets flags for a part of it, which is not read")
                self._look(argument[3], looks)
            elif code in _LOOKS:
                if looks:
                    raise ValueError("it looks around within looking around, which is not read")
                self._look(argument[1], looks + 1)
            elif code not in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT):
                raise ValueError(f"it uses {str(code).lower()}, which is not read")


def _joined(nodes: Iterable[Any], fold: bool) -> list[Any]:
    """Return the parts with neighbouring letters joined to one string, which is looked for at once."""
    found: list[Any] = []
    for code, argument in nodes:
        if code is op.LITERAL and not fold:
            before = found.pop()[1] if found and found[-1][0] is _STRING else ""
            code, argument = _STRING, before + chr(argument)
        elif code is op.SUBPATTERN:
            argument = _joined(argument[3], fold)
        elif code is op.BRANCH:
            argument = [_joined(branch, fold) for branch in argument[1]]
        elif code in _REPEATS:
            argument = (*argument[:2], _joined(argument[2], fold))
        elif code in _LOOKS:
            argument = (argument[0], argument[1].getwidth()[0], _joined(argument[1], fold))
        found.append((code, argument))
    return found


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> _Expression:
    try:
        return _Expression(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None


def check(pattern: str) -> None:
    """Raise `ValueError` for an expression that `matches` cannot use."""
    _parsed(pattern)


class _Run:
    """One text against one expression: from a set of places to the set of places after a part of the expression."""

    def __init__(self, text: str, pattern: str, fold: bool) -> None:
        self.text, self.pattern, self.fold, self.steps = text, pattern, fold, 0

    def sequence(self, nodes: Iterable[Any], places: set[int]) -> set[int]:
        for code, argument in nodes:
            if not places:
                break
            self.steps += len(places)
            if self.steps > STEPS:
                raise UnsupportedAdapter(f"the regular expression {self.pattern[:80]!r} takes too long to match")
            places = self._after(code, argument, places)
        return places

    def _after(self, code: Any, argument: Any, places: set[int]) -> set[int]:
        if code is _STRING:
            if argument not in self.text:
                return set()
            return {place + len(argument) for place in places if self.text.startswith(argument, place)}
        if code is op.SUBPATTERN:
            return self.sequence(argument, places)
        if code is op.BRANCH:
            return set().union(*(self.sequence(branch, places) for branch in argument))
        if code in _REPEATS:
            return self._repeat(argument[0], argument[1], argument[2], places)
        if code is op.AT:
            return {place for place in places if self._at(argument, place)}
        if code in _LOOKS:
            return {place for place in places if self._look(argument, place) == (code is op.ASSERT)}
        test = self._test(code, argument)
        return {place + 1 for place in places if place < len(self.text) and test(self.text[place])}

    def _repeat(self, low: int, high: int, nodes: Any, places: set[int]) -> set[int]:
        if low == 0 and high is op.MAXREPEAT and len(nodes) == 1 and nodes[0][0] is op.ANY:
            stop = self.text.find("\n", min(places))
            if stop < 0:
                return set(range(min(places), len(self.text) + 1))  # `.*`, by far the most frequent
        for _ in range(min(low, 2 * len(self.text) + 2)):  # beyond that, only empty repeats can follow
            places = self.sequence(nodes, places)
        reached, count = set(places), low
        while places and count < high:
            places = self.sequence(nodes, places) - reached
            reached |= places
            count += 1
        return reached

    def _at(self, where: Any, place: int) -> bool:
        text, end = self.text, len(self.text)
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return place == 0
        if where is op.AT_END_STRING:
            return place == end
        if where is op.AT_END:
            return place == end or (place == end - 1 and text[place] == "\n")
        return (_BOUNDARY if where is op.AT_BOUNDARY else _NO_BOUNDARY).match(text, place) is not None

    def _look(self, argument: Any, place: int) -> bool:
        direction, width, nodes = argument
        if direction > 0:
            return bool(self.sequence(nodes, {place}))
        start = place - width  # behind, Python looks only for what has a fixed width
        return start >= 0 and place in self.sequence(nodes, {start})

    def _test(self, code: Any, argument: Any) -> Callable[[str], bool]:
        if code is op.ANY:
            return lambda character: character != "\n"
        if code is not op.IN:
            wanted = self._folded(chr(argument))
            return lambda character: (self._folded(character) == wanted) == (code is op.LITERAL)
        negated = argument[0][0] is op.NEGATE
        return lambda character: self._member(argument[negated:], character) != negated

    def _folded(self, character: str) -> str:
        return character.lower() if self.fold else character

    def _member(self, items: Any, character: str) -> bool:
        forms = {character, character.lower(), character.upper()} if self.fold else {character}
        for code, argument in items:
            if code is op.CATEGORY:
                if re.match(_CATEGORIES[argument], character):
                    return True
            else:
                low, high = (argument, argument) if code is op.LITERAL else argument
                if any(len(form) == 1 and low <= ord(form) <= high for form in forms):
                    return True
        return False
