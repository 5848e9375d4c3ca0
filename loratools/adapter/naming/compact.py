"""Many module names in few lines: `model.layers.[0-29].self_attn.{q,v}_proj`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache, lru_cache

REMEMBERED = 1 << 16
"""Names of which the last answers are kept: they are asked about often, and the next adapter has the same.

Were an adapter to have more, asked about in turn, each would be forgotten before it is asked about again.
"""

# A pattern: for each place between the dots, the set of what stands there. It means every combination.
_Pattern = tuple[frozenset[str], ...]


def compact(names: Iterable[str]) -> list[str]:
    """Return patterns that together mean exactly these names, in natural order.

    Names are joined when they differ in one place only: numbers first (`[0-3,7]`), then words (`{q,v}_proj`), so a
    pattern never means a name that was not given.

    >>> compact(["h.0.attn.q_proj", "h.0.attn.v_proj", "h.1.attn.q_proj", "h.1.attn.v_proj"])
    ['h.[0-1].attn.{q,v}_proj']
    """
    return list(_compact(tuple(names)))


@lru_cache(64)  # the next adapter has the same modules
def _compact(names: tuple[str, ...]) -> tuple[str, ...]:
    alone = cache(lambda part: frozenset({part}))  # one for all names that have it
    patterns: set[_Pattern] = {tuple(map(alone, name.split("."))) for name in names}
    longest = max(map(len, patterns), default=0)
    places = range(longest - 1, -1, -1)
    for numbers in (True, False):
        for place in places:
            found = {pattern[place] for pattern in patterns if place < len(pattern)}
            joined = {parts for parts in found if all(map(_is_number, parts)) == numbers}
            if len(joined) > 1:
                patterns = _join(patterns, place, joined)
    return tuple(sorted((".".join(map(_show, pattern)) for pattern in patterns), key=natural))


@lru_cache(REMEMBERED)
def natural(name: str) -> str:
    """Return a sort key that puts layer 9 before layer 10.

    >>> sorted(["h.10.q", "h.9.q", "h.q", "h.9", "h.09.q"], key=natural)
    ['h.09.q', 'h.9', 'h.9.q', 'h.10.q', 'h.q']
    """
    return _digits().sub(_counted, name)


@cache
def _digits() -> re.Pattern[str]:
    return re.compile(r"\d+")


def _counted(match: re.Match[str]) -> str:
    """Return digits behind their number, so that a text compares as what is written: what is longer is larger.

    They come before all text, and what is no number as it is usually written, such as 007, before all numbers.
    """
    digits = match[0]
    return f"\0\2{chr(len(digits))}{digits}" if _is_number(digits) else f"\0\1{digits}\0"


def _is_number(part: str) -> bool:
    """Tell whether this is the decimal form of a number below 10^18."""
    return part.isdigit() and part.isascii() and len(part) < 19 and (part[0] != "0" or part == "0")


def _join(patterns: set[_Pattern], place: int, joined: Collection[frozenset[str]]) -> set[_Pattern]:
    groups: dict[tuple[_Pattern, _Pattern], set[str]] = defaultdict(set)
    others = set()
    for pattern in patterns:
        if place < len(pattern) and pattern[place] in joined:
            groups[pattern[:place], pattern[place + 1 :]] |= pattern[place]
        else:
            others.add(pattern)
    return others | {(*before, frozenset(parts), *after) for (before, after), parts in groups.items()}


def _show(parts: frozenset[str]) -> str:
    if len(parts) == 1:
        return next(iter(parts))
    ordered = sorted(parts, key=natural)
    if all(map(_is_number, ordered)):
        return f"[{','.join(_ranges([int(part) for part in ordered]))}]"
    words = [part.split("_") for part in ordered]
    head = tail = 0
    while all(len(word) > head + 1 and word[head] == words[0][head] for word in words):
        head += 1
    while all(len(word) > head + tail + 1 and word[-1 - tail] == words[0][-1 - tail] for word in words):
        tail += 1
    middle = ",".join("_".join(word[head : len(word) - tail]) for word in words)
    return "_".join([*words[0][:head], f"{{{middle}}}", *words[0][len(words[0]) - tail :]])


def _ranges(numbers: list[int]) -> Iterable[str]:
    start = last = numbers[0]
    for number in [*numbers[1:], None]:
        if number != last + 1:
            yield str(start) if start == last else f"{start}-{last}"
            start = number  # type: ignore[assignment]
        last = number  # type: ignore[assignment]


@lru_cache(REMEMBERED)
def suffixes(module: str) -> tuple[str, ...]:
    """Return what PEFT's rule for a list entry lets name a module: its path, and each suffix of it after a dot."""
    names = [module]
    while (dot := module.find(".")) >= 0:
        module = module[dot + 1 :]
        names.append(module)
    return tuple(names)
