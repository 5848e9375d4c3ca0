"""The front matter of a model card, line by line: a field is set where it stands, and every other line stays."""

from __future__ import annotations

import re
from typing import Any

from loratools.errors import BadFile
from loratools.storage.beside.plain_yaml import parse_yaml

_KEY = re.compile(r"([A-Za-z_][\w-]*|\"[^\"]+\"|'[^']+')\s*:(?=\s|$)")


def parted(readme: str) -> tuple[list[str], str]:
    """Return the lines of the front matter of a README.md, [] where it has none, and the text behind it.

    Raises `BadFile` where the front matter has no end.
    """
    lines = readme.replace("\r\n", "\n").removeprefix("\ufeff").split("\n")
    if lines[0].rstrip() != "---":
        return [], "\n".join(lines)
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise BadFile("README.md: the front matter is not closed by a line ---")
    return lines[1:end], "\n".join(lines[end + 1 :])


def data_of(lines: list[str]) -> dict[str, Any]:
    """Return the front matter; raise `BadFile` where it is not YAML of names and values."""
    return parse_yaml("\n".join(lines), "README.md: the front matter") or {}


def with_field(lines: list[str], name: str, value: Any) -> list[str]:
    """Replace a top-level field where it stands, or add it at the end; None takes it out."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    visible = str(value).isprintable()  # what is not is escaped
    text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=visible, width=1000)
    new = [] if value is None else text.rstrip("\n").split("\n")
    starts = [i for i, line in enumerate(lines) if _KEY.match(line)]
    for at, start in enumerate(starts):
        key = _KEY.match(lines[start])
        if key and key[1].strip("\"'") == name:
            end = starts[at + 1] if at + 1 < len(starts) else len(lines)
            while end > start + 1 and re.fullmatch(r"\s*(#.*)?", lines[end - 1]):
                end -= 1  # a remark above the next field belongs to that one
            return [*lines[:start], *new, *lines[end:]]
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return [*lines, *new]
