"""Sections are cut out of cards as one regular expression would do it, and in linear time."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from loratools.errors import BadFile
from loratools.storage.beside.cards import MAX_CARD, cut, read_bytes, read_card

OPENING, CLOSING = re.compile(r"<!-- a (?P<n>\d*) -->"), "<!-- /a -->"
WHOLE = re.compile(r"\n*<!-- a \d* -->.*?<!-- /a -->\n*", re.DOTALL)


@pytest.mark.parametrize("seed", range(300))
def test_cut_is_what_the_expression_says(seed: int) -> None:
    chance = random.Random(seed)
    parts = ["\n", "\n\n", "text", "<!-- a 1 -->", "<!-- a -->", "<!-- /a -->", "<!-- a 22 -->", " "]
    text = "".join(chance.choice(parts) for _ in range(chance.randrange(30)))
    joint = chance.choice(["\n", "\n\n", ""])
    expected = WHOLE.search(text)
    assert cut(text, OPENING, CLOSING, joint)[0] == WHOLE.sub(joint, text)
    mark = cut(text, OPENING, CLOSING, joint)[1]
    assert (mark[0] if mark else None) == (OPENING.search(expected[0])[0] if expected else None)  # type: ignore[index]


@pytest.mark.parametrize("piece", ["\n", "<!-- a 1 -->\n", "<!-- a 1 -->x<!-- /a -->\n", "<!-- /a -->"])
def test_a_million_of_anything(piece: str) -> None:
    """The expression takes hours for the first two."""
    text = piece * (4_000_000 // len(piece))
    done, _ = cut(text + "x", OPENING, CLOSING, "\n")
    assert done.endswith("x")


def test_cards_are_read_in_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"caf\xe9\n")
    assert read_card(path) == "caf\ufffd\n"
    assert read_bytes(path) == b"caf\xe9\n"
    os.truncate(path, MAX_CARD + 1)
    with pytest.raises(BadFile, match=r"README\.md: 10000001 bytes; a model card of at most 10000000 is read"):
        read_card(path)
