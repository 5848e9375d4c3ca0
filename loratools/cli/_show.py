"""The result on stdout: text for people, or one JSON document."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from loratools.errors import printable

SCHEMA = 1
"""Version of the JSON documents: it changes when a key is removed or changes its meaning."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Report:
    """What a command found: `document` for --json, `text` for people: lines, which may be made as they are printed.

    Ends of lines inside a line are escaped. `ok` is False where the answer is no (not valid, not equal): the exit code
    is 1. `line` says it in one line without the path, where a command was run on several; None where that is too
    little, and `text` is shown there too. `verbatim` text is for other programs: no terminal's width breaks its lines.
    """

    document: Mapping[str, Any]
    text: str | Iterable[str]
    ok: bool = True
    line: str | None = None
    verbatim: bool = False


def encode(document: Mapping[str, Any]) -> str:
    """Return a JSON document in ASCII, of `plain` values."""
    return json.dumps(plain(document), indent=2, allow_nan=False)


def encode_line(document: Mapping[str, Any]) -> str:
    """Return a JSON document in ASCII on one line, of `plain` values."""
    return json.dumps(plain(document), separators=(",", ":"), allow_nan=False)


def encode_text(text: str) -> str:
    """Return a text as it stands between the quotes of a JSON document."""
    return json.dumps(text)[1:-1]


_ATOMS = frozenset({str, int, bool, type(None)})


@cache
def _names(kind: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or a named tuple; () for any other type."""
    if issubclass(kind, tuple):
        return getattr(kind, "_fields", ())
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def plain(value: Any) -> Any:
    """Return a value as JSON types: what has fields as an object, paths as strings, NaN and infinity as null."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if names := _names(kind):  # type: ignore[arg-type,unused-ignore]
        return {name: plain(getattr(value, name)) for name in names}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class Fields(Mapping[str, Any]):
    """What has fields as an object of JSON, each made `plain` when it is asked for: most runs print no document.

    `others` are fields beside its own, or in their place, that are made then.
    """

    def __init__(self, value: Any, **others: Callable[[], Any]) -> None:
        self._value, self._others = value, others
        names = _names(type(value))  # type: ignore[arg-type,unused-ignore]
        self._fields = tuple(dict.fromkeys((*names, *others)))

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise KeyError(name)
        return self._others[name]() if name in self._others else plain(getattr(self._value, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


_NAME = 16  # characters that a name in a table keeps at least
_DIGEST = r"(blake3|sha256):[0-9a-f]{64}[,;]?"
_NARROWEST = 40  # characters of a terminal; on a narrower one lines are broken by it
LONGEST = 20_000
"""Characters of a printed line; of a longer one the rest is counted."""


def line(text: str) -> str:
    """Return a line as it is printed: everything in it can be seen, and it has an end."""
    more = f"… and {len(text) - LONGEST} characters more" if len(text) > LONGEST else ""
    return printable(text[:LONGEST]) + more


def clipped(text: str, most: int) -> str:
    """Return at most so many characters of a text, and how many more it has."""
    return f"{text[:most]}… and {len(text) - most} characters more" if len(text) > most else text


def entry(text: str, most: int) -> str:
    """Return at most so many characters of an entry's value; of a picture, that it is one and its size."""
    head, _, data = text.partition(";base64,")
    return f"a picture, {size(len(data) * 3 // 4)}" if head.startswith("data:image/") and data else clipped(text, most)


_NUMBERS = r"(?<=[._])\d+(?=[._:;,)\]'\"\s]|$)|(?<=layer )\d+|(?<=layers )\d+|(?<=block )\d+|(?<=blocks )\d+"


def alike(text: str) -> str:
    """Return a text without the numbers of modules and layers: what is equal then is said once.

    >>> alike("model.layers.11.q_proj: rank 8 in layer 3") == alike("model.layers.2.q_proj: rank 8 in layer 7")
    True
    >>> alike("m.0: rank 8") == alike("m.0: rank 4")
    False
    """
    return re.sub(_NUMBERS, "#", text)


def counted(texts: Iterable[str]) -> list[str]:
    """Return the first of all texts that differ in numbers of modules and layers alone, with how many more there are.

    >>> counted(["h.0.q: odd", "h.1.q: odd", "h.0.k: odd", "h.2.q: odd"])
    ['h.0.q: odd (and 2 more like it, of other modules or layers)', 'h.0.k: odd']
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(alike(text), []).append(text)
    more = "{} (and {} more like it, of other modules or layers)"
    return [first if not rest else more.format(first, len(rest)) for first, *rest in groups.values()]


def room() -> int | None:
    """Return how many characters a line of stdout may have: those of the terminal; None where it is no terminal."""
    try:
        if sys.stdout is None or not sys.stdout.isatty():
            return None
    except ValueError:  # it is closed
        return None
    import shutil

    return max(_NARROWEST, shutil.get_terminal_size().columns)


def fitted(text: str, columns: int | None) -> list[str]:
    """Return a line as several where it is longer than a terminal has `columns`, broken at spaces.

    >>> fitted("  a: one two three", 14)
    ['  a: one two', '    three']
    """
    if columns is None or len(text) <= columns:
        return [text]
    indent = len(text) - len(text.lstrip(" "))
    first, *rest = _wrapped(text[indent:], columns - indent)
    more = _wrapped(" ".join(rest), columns - indent - 2) if rest else []
    return [" " * indent + first, *(" " * (indent + 2) + each for each in more)]


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` characters: a longer one loses its middle.

    >>> shortened("model.layers.0.self_attn.q_proj", 16)
    'model.l…n.q_proj'
    """
    if len(text) <= width:
        return text
    left = max(0, width - 1)
    return f"{text[: left // 2]}…{text[len(text) - (left - left // 2) :]}"


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
    """Yield `name  value` lines, aligned; a list's lines stay in their column, None leaves its row out.

    On a terminal a value that is too wide goes on in the next line.
    """
    shown = [(name, [value] if isinstance(value, str) else value) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    columns = room()
    for name, lines in shown:
        if columns is not None:
            lines = [part for each in lines for part in _wrapped(line(each), columns - width - 2)] or [""]
        for index, each in enumerate(lines):
            if columns is not None and len(each) > columns - width - 2:  # a digest, which is copied whole
                yield from ((name,) if not index else ())
                yield f"  {shortened(each, columns - 2)}"
                continue
            yield f"{'' if index else name:<{width}}  {each}".rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width`, broken at spaces; a longer word loses its middle, no digest does."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        shown = word if re.fullmatch(_DIGEST, word) else shortened(word, width)
        lines[-1] = f"{lines[-1]} {shown}" if lines[-1] else shown
    return lines


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Iterable[str]:
    """Yield an aligned table; the columns numbered in `right` are aligned to the right.

    On a terminal long names lose their middle, and columns that do not fit stand in a table below, beside the first.
    """
    lines = [tuple(heading), *(tuple(map(line, row)) for row in rows)]
    columns = room()
    widths = [max(len(row[column]) for row in lines) for column in range(len(heading))]
    blocks = [list(range(len(heading)))]
    if columns is not None:
        widths = _narrowed(widths, lines, columns, right)
        blocks = _blocks(widths, columns)
    for number, block in enumerate(blocks):
        yield from ("",) if number else ()
        for row in lines:
            cells = (
                shortened(row[column], widths[column]).rjust(widths[column])
                if column in right
                else shortened(row[column], widths[column]).ljust(widths[column])
                for column in block
            )
            yield "  ".join(cells).rstrip()


def _narrowed(widths: Sequence[int], lines: Sequence[Sequence[str]], columns: int, right: Sequence[int]) -> list[int]:
    """Return widths with which a row fits, as far as columns of text can be narrower: the widest loses first.

    Names that would be equal then stay as they are, up to the whole width, and other columns go below.
    """
    narrow, least = list(widths), [len(name) for name in lines[0]]
    text = [column for column in range(len(widths)) if column not in right]
    while (over := sum(narrow) + 2 * (len(narrow) - 1) - columns) > 0:
        wide = [column for column in text if narrow[column] > max(_NAME, least[column])]
        if not wide:
            break
        widest = max(wide, key=lambda column: narrow[column])
        second = max((narrow[column] for column in wide if narrow[column] < narrow[widest]), default=0)
        narrow[widest] -= min(over, narrow[widest] - max(_NAME, least[widest], second)) or 1
    names = {row[0] for row in lines} if widths else set()
    if over > 0 or len({shortened(name, narrow[0]) for name in names}) < len(names):
        beside = max((min(narrow[column], columns // 2) for column in range(1, len(narrow))), default=0)
        narrow[0] = max(_NAME, min(widths[0], columns - beside - 2))
    return [min(width, columns) for width in narrow]


def _blocks(widths: Sequence[int], columns: int) -> list[list[int]]:
    """Return the columns of each table that fits; the first column stands in all."""
    blocks, used = [[0]] if widths else [[]], widths[0] if widths else 0
    for column, width in enumerate(widths[1:], 1):
        if len(blocks[-1]) > 1 and used + 2 + width > columns:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(column)
        used += 2 + width
    return blocks
