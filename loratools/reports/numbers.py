"""Numbers and names as a page shows them: few digits, units that people read, names that fit their place."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePosixPath, PureWindowsPath


def number(value: float) -> str:
    """Return a number with three digits that count.

    Example:
        >>> number(12.345), number(0.00012345), number(1234.5), number(2)
        ('12.3', '0.000123', '1,234', '2')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{float(text):.8f}".rstrip("0").rstrip(".") if "e" in text else text


def percent(share: float) -> str:
    """Return a share in percent: near 0 and near 1 with as many digits as tell it from them, at most five.

    Example:
        >>> percent(0.5), percent(0.9999861), percent(0.00042), percent(1.0)
        ('50.0 %', '99.9986 %', '0.042 %', '100 %')
    """
    if share in (0.0, 1.0) or not math.isfinite(share):
        return f"{number(share * 100)} %"
    distance = min(abs(share), abs(1 - share)) * 100
    digits = 1 if distance >= 1 else min(5, 1 - math.floor(math.log10(distance))) if distance > 0 else 1
    text = f"{share * 100:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits > 1 else text} %"


def whole(count: int) -> str:
    """Return a count with its digits in groups.

    Example:
        >>> whole(31232)
        '31,232'
    """
    return f"{count:,}"


def plural(count: int, word: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "module"), plural(16, "module")
        ('1 module', '16 modules')
    """
    return f"{whole(count)} {word}{'' if count == 1 else 's'}"


def size(nbytes: int) -> str:
    """Return bytes in powers of ten.

    Example:
        >>> size(999), size(125_312), size(24_700_000_000)
        ('999 B', '125 kB', '24.7 GB')
    """
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def width(text: str) -> int:
    """Return how many columns of a fixed-width font a text takes.

    Example:
        >>> width("q_proj"), width("模型")
        (6, 4)
    """
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shortened(text: str, most: int) -> str:
    """Return a text that takes at most `most` columns; what is left out of its middle is an ellipsis.

    Example:
        >>> shortened("down_blocks.1.attentions.0", 16)
        'down_blo…tions.0'
    """
    if width(text) <= most:
        return text
    return f"{_beginning(text, most // 2)}…{_beginning(text[::-1], (most - 1) // 2)[::-1]}"


def _beginning(text: str, most: int) -> str:
    """Return as much of a text as takes at most `most` columns."""
    taken = list(accumulate(map(_columns, text[: most + 1])))
    return text[: bisect_right(taken, most)]


def names_of(locations: Sequence[str]) -> list[str]:
    """Return what a page calls its inputs: file names alone, and of those that are alike as many folders as it takes.

    A reference such as `hf://org/name` keeps its name. No page tells where on a machine something lay.

    Example:
        >>> names_of(["/home/me/a/adapter", "/home/me/b/adapter", "other.safetensors"])
        ['a/adapter', 'b/adapter', 'other.safetensors']
    """
    parts = [_parts(location) for location in locations]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        longer = [
            length + 1 if names.count(name) > 1 and length < len(each) else length
            for name, each, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            break
        lengths = longer
    seen: dict[str, int] = {}
    for i, name in enumerate(names):  # one input given twice
        seen[name] = seen.get(name, 0) + 1
        names[i] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return names


def _parts(location: str) -> list[str]:
    scheme, _, rest = location.partition("://")
    if rest:
        return [rest.strip("/") or scheme]
    path = PureWindowsPath(location) if "\\" in location or location[1:2] == ":" else PurePosixPath(location)
    parts = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    return list(parts) or ["this folder"]
