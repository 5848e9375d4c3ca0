"""Model cards as text: read in bounded size, sections of ours cut out in linear time, and what a cell may hold."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loratools.errors import BadFile, printable
from loratools.storage.sources import open_file

MAX_CARD = 10_000_000
"""Bytes of a README.md; the longest cards, with tables of results, have about a million."""


def read_card(path: Path) -> str:
    """Return a README.md as text, bytes that are no UTF-8 replaced; raise `BadFile` where it is larger than a card."""
    return read_bytes(path).decode("utf-8", errors="replace")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a README.md; raise `BadFile` where it is larger than a card."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_CARD:
            raise BadFile(f"{path}: {size} bytes; a model card of at most {MAX_CARD} is read")
        return file.read(size)


def code(text: str | None) -> str:
    """Return text of a file that nobody has checked as code in one cell: no mark-up, no end of line, no way out."""
    cleaned = re.sub(r"[`|<>]", " ", " ".join(printable(text or "")[:300].split()))
    return f"`{cleaned}`"


def cut(text: str, opening: re.Pattern[str], closing: str, joint: str) -> tuple[str, re.Match[str] | None]:
    """Put `joint` in the place of each section, and return the text with the mark that opens the first section.

    A section goes from what `opening` matches to the next `closing`, with the line ends before and after it. One
    regular expression for all of it would take quadratic time on a card of line ends, or of marks without an end.
    """
    pieces, at, first = [], 0, None
    for match in opening.finditer(text):
        if match.start() < at:
            continue  # inside the section before
        end = text.find(closing, match.end())
        if end < 0:
            break
        first = first or match
        pieces.append(text[at : match.start()].rstrip("\n"))
        at = end + len(closing)
        while text.startswith("\n", at):
            at += 1
    return joint.join([*pieces, text[at:]]), first
