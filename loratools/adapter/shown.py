"""What a notebook shows of a value: a table in HTML, with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from loratools.errors import printable


def table(title: str, fields: Iterable[tuple[str, str]], heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a title, lines of `name: value`, and a table with a heading, as HTML.

    Every text is escaped, and what cannot be seen in it is written out: names in an adapter's file are a stranger's.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        shown = "".join(f'<{tag} style="text-align: left">{_text(text)}</{tag}>' for text in texts)
        return f"<tr>{shown}</tr>"

    lines = "".join(f"<div>{_text(name)}: {_text(value)}</div>" for name, value in fields)
    body = "".join(cells("td", row) for row in rows)
    shown = f"<table><thead>{cells('th', heading)}</thead><tbody>{body}</tbody></table>" if body else ""
    return f"<div><strong>{_text(title)}</strong>{lines}{shown}</div>"


def _text(text: str) -> str:
    return escape(printable(text))
