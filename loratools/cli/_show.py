"""The result on stdout: text for people, or one JSON document."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratools.errors import printable

SCHEMA = 1
"""Version of the JSON documents: it changes when a key is removed or changes its meaning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a command found: `document` for --json, `text` for people: lines, which may be made as they are printed.

    Ends of lines inside a line are escaped. `ok` is False where the answer is no (not valid, not equal): the exit code
    is 1. `line` says it in one line without the path, where a command was run on several; None where that is too
    little, and `text` is shown there too.
    """

    document: Mapping[str, Any]
    text: str | Iterable[str]
    ok: bool = True
    line: str | None = None


def encode(document: Mapping[str, Any]) -> str:
    """Return a JSON document in ASCII, of `plain` values."""
    return json.dumps(plain(document), indent=2, allow_nan=False)


def encode_line(document: Mapping[str, Any]) -> str:
    """Return a JSON document in ASCII on one line, of `plain` values."""
    return json.dumps(plain(document), separators=(",", ":"), allow_nan=False)


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


LONGEST = 20_000
"""Characters of a printed line; of a longer one the rest is counted."""


def line(text: str) -> str:
    """Return a line as it is printed: everything in it can be seen, and it has an end."""
    more = f"… and {len(text) - LONGEST} characters more" if len(text) > LONGEST else ""
    return printable(text[:LONGEST]) + more


def clipped(text: str, most: int) -> str:
    """Return at most so many characters of a text, and how many more it has."""
    return f"{text[:most]}… and {len(text) - most} characters more" if len(text) > most else text


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


def fields(*rows: tuple[str, str | Sequence[str] | None]) -> Iterable[str]:
    """Yield `name  value` lines, aligned; a list's lines stay in their column, None leaves its row out."""
    shown = [(name, [value] if isinstance(value, str) else value) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, lines in shown:
        for index, each in enumerate(lines):
            yield f"{'' if index else name:<{width}}  {each}".rstrip()


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Iterable[str]:
    """Yield an aligned table; the columns numbered in `right` are aligned to the right."""
    lines = [tuple(heading), *(tuple(map(line, row)) for row in rows)]
    widths = [max(len(row[column]) for row in lines) for column in range(len(heading))]
    for row in lines:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
