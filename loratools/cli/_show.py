"""The result on stdout: text for people, or one JSON document."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEMA = 1
"""Version of the JSON documents: it changes when a key is removed or changes its meaning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a command found: `document` for --json, `text` for people (lines, which may be made as they are printed).

    `ok` is False where the answer is no (not valid, not equal): the exit code is 1.
    """

    document: Mapping[str, Any]
    text: str | Iterable[str]
    ok: bool = True


def encode(document: Mapping[str, Any]) -> str:
    """Return a JSON document in ASCII, of `plain` values."""
    return json.dumps(plain(document), indent=2, allow_nan=False)


def encode_text(text: str) -> str:
    """Return a text as it stands between the quotes of a JSON document."""
    return json.dumps(text)[1:-1]


def plain(value: Any) -> Any:
    """Return a value as JSON types: dataclasses as objects, paths as strings, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text with control characters escaped: a tensor's name must not be able to drive the terminal."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def size(nbytes: int) -> str:
    """Return bytes as people write them, in powers of ten: `999 B`, `1.80 MB`, `24.7 GB`."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    unit = units[0]
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def exact(number: int) -> str:
    """Return a count with all its digits in groups: `134,515,008`."""
    return f"{number:,}"


def number(value: float) -> str:
    """Return a number without needless digits: `2`, `0.5`, `11.31`."""
    return f"{value:.4g}"


def fields(*rows: tuple[str, str | None]) -> Iterable[str]:
    """Yield `name  value` lines, aligned; a value of several lines stays in its column, None leaves its row out."""
    shown = [(name, value) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        for index, line in enumerate(value.splitlines() or [""]):
            yield f"{'' if index else name:<{width}}  {line}".rstrip()


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Iterable[str]:
    """Yield an aligned table; the columns numbered in `right` are aligned to the right."""
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
