"""How numbers, tables and data are printed."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from loratools.cli import _show as show
from loratools.cli._pieces import encoded
from loratools.cli._show import LONGEST, alike, encode, exact, fields, fitted, line, number, shortened, size, table
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


DIGEST = "blake3:" + "0123456789abcdef" * 4
ROWS = [
    ("model.language_model.layers.0.self_attn.q_proj", *map(str, range(1, 8)), "some words that tell why this is so"),
    ("x", *["12345678"] * 7, ""),
]
HEADING = ("module", *(f"number {i}" for i in range(1, 8)), "why")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140, 200])
def test_tables_and_fields_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = list(table(HEADING, ROWS, right=range(1, 8)))
    assert max(map(len, lines)) <= columns
    told = " ".join(lines)
    assert told.count("12345678") == 7, "no number is cut or left out"
    assert all(name in told for name in HEADING)
    lines = list(fields(("path", "/a/very/long/path" * 6), ("digest", DIGEST), ("why", "one word and another " * 8)))
    assert max(map(len, lines)) <= columns
    assert (DIGEST in "\n".join(lines)) is (columns >= 73)
    assert " ".join(lines).count("another") == 8


def test_what_fits_is_as_it_is_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = [*table(HEADING, ROWS, right=range(1, 8)), *fields(("digest", DIGEST), ("a", ["b", "c"]), ("d", ""))]
    assert max(map(len, piped)) > 100
    monkeypatch.setenv("COLUMNS", "60")
    again = [*table(HEADING, ROWS, right=range(1, 8)), *fields(("digest", DIGEST), ("a", ["b", "c"]), ("d", ""))]
    assert again == piped, "a pipe has no width"
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "stdout", Terminal())
    wide = [*table(HEADING, ROWS, right=range(1, 8)), *fields(("digest", DIGEST), ("a", ["b", "c"]), ("d", ""))]
    assert wide == piped


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("line", [
    "lora: rank 8, alpha 16, scaling 2", "  model.layers.[0-29].self_attn.{q,k,v,o}_proj  (" + "why " * 30 + ")",
    "x" * 300, "    " + "y" * 300 + " and more",
])  # fmt: skip
def test_a_line_fits_the_terminal(line: str, columns: int) -> None:
    lines = fitted(line, columns)
    assert max(map(len, lines)) <= columns
    if all(len(word) < columns - 8 for word in line.split()):
        assert "".join(lines).replace(" ", "") == line.replace(" ", "")
    assert fitted(line, None) == [line]


@pytest.mark.parametrize("width", range(1, 12))
def test_a_shortened_text_keeps_both_ends(width: int) -> None:
    text = shortened("abcdefghijkl", width)
    assert len(text) == width
    assert "…" in text
    assert "abcdefghijkl".startswith(text.partition("…")[0])
    assert "abcdefghijkl".endswith(text.partition("…")[2])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("model.layers.0.mlp: odd", "model.layers.31.mlp: odd", True),
        ("lora_unet_down_blocks_0_attentions_1: odd", "lora_unet_down_blocks_2_attentions_0: odd", True),
        ("layer 3 is odd", "layer 17 is odd", True),
        ("h.0.q: rank 8", "h.0.q: rank 4", False),
        ("h.0.q: odd", "h.0.k: odd", False),
        ("adapter 1: odd", "adapter 2: odd", False),
    ],
)
def test_texts_that_differ_in_numbers_of_layers_alone_are_alike(first: str, second: str, same: bool) -> None:
    assert (alike(first) == alike(second)) is same


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


def test_fields_are_made_when_they_are_asked_for() -> None:
    @dataclass
    class Odd:
        path: Path
        number: float
        list: tuple[int, ...]

    asked: list[str] = []
    made = show.Fields(
        Odd(Path("a"), float("nan"), (1, 2)), number=lambda: asked.append("number") or 3, more=lambda: "x"
    )
    assert made.get("warnings", ()) == ()
    assert made["list"] == [1, 2]
    assert asked == []
    assert json.loads(encode(made)) == {"path": "a", "number": 3, "list": [1, 2], "more": "x"}
    assert (len(made), asked) == (4, ["number"])


def test_a_long_document_is_the_same_in_pieces() -> None:
    document = {"text": "a\n" * 9, "numbers": [i / 7 for i in range(40_000)], "none": (math.nan, None, ())}
    pieces = list(encoded(document))
    assert len(pieces) > 2
    assert "".join(pieces) == encode(document)
