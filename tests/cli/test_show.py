"""How numbers, tables and data are printed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from loratools.cli._show import LONGEST, encode, exact, fields, line, number, size, table
from loratools.errors import printable


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_471_645_608, "2.47 GB"),
        (7 * 10**18, "7000 PB"),
    ],
)
def test_size(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown


def test_numbers() -> None:
    assert exact(134_515_008) == "134,515,008"
    assert [number(value) for value in (2.0, 0.5, 16 / 2**0.5, 1e-7, -0.25)] == ["2", "0.5", "11.31", "1e-07", "-0.25"]


def test_fields_align_and_keep_lines_in_their_column() -> None:
    assert list(fields(("a", "one"), ("long", ["two", "three"]), ("left out", None), ("b", ""))) == [
        "a     one",
        "long  two",
        "      three",
        "b",
    ]


def test_table_aligns_to_the_right_where_asked() -> None:
    assert list(table(("name", "n"), [("x", "1"), ("longer", "100")], right=(1,))) == [
        "name      n",
        "x         1",
        "longer  100",
    ]
    assert list(table(("name", "n"), [])) == ["name  n"]


@pytest.mark.parametrize("text", ["plain\ttext", "ünïcode → λ", "漢字 ﷽ 😀"])
def test_printable_keeps_text(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb", "a\\rb"),
        ("\x9b1m", "\\x9b1m"),
        ("x\u202ey", "x\\u202ey"),
        ("\x7f", "\\x7f"),
        ("a\nerror: b", "a\\nerror: b"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\u200f\u061c", "\\u200f\\u061c"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("a\u200b\ufeff\u00ad", "a\\u200b\\ufeff\\xad"),
        ("\U000e0041", "\\U000e0041"),
        ("\udc9b", "\\udc9b"),
        ("\x1b]0;t\x07", "\\x1b]0;t\\x07"),
        ("\0\b", "\\x00\\x08"),
    ],
)
def test_printable_escapes_what_drives_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_have_an_end() -> None:
    assert line("x" * LONGEST) == "x" * LONGEST
    assert line("x" * (LONGEST + 7)) == "x" * LONGEST + "… and 7 characters more"


def test_a_name_cannot_make_a_line_of_a_table() -> None:
    assert list(table(("name", "n"), [("a\nb", "1"), ("c", "2")])) == ["name  n", "a\\nb  1", "c     2"]


@dataclass(frozen=True)
class Point:
    where: Path
    values: tuple[float, ...]


def test_encode() -> None:
    document = {"point": Point(Path("a/b"), (1.5, float("inf"), float("nan"))), "set": {3}, 7: None, "name": "\udce9ü"}
    text = encode(document)
    assert text.isascii()
    assert json.loads(text) == {
        "point": {"where": "a/b", "values": [1.5, None, None]},
        "set": [3],
        "7": None,
        "name": "\udce9ü",
    }
