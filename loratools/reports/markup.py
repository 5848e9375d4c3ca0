"""HTML and SVG as text that knows it is markup: whatever else becomes part of it is escaped first."""

from __future__ import annotations

from html import escape

from loratools.errors import printable


class Markup(str):
    """Markup that was made here. Any other text, such as a module's name, is escaped where it becomes part of it."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Return a text as markup: everything in it can be seen, and nothing of it is obeyed; markup stays as it is.

    Ends of lines, marks of direction and all that has no glyph are written out (`printable`), then <, >, & and quotes.

    Example:
        >>> escaped("<script>\\n")
        '&lt;script&gt;\\\\n'
    """
    return text if isinstance(text, Markup) else Markup(escape(printable(text)))


def joined(*parts: str) -> Markup:
    """Return several texts or markups as one, without anything between."""
    return Markup("".join(map(escaped, parts)))


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element; an attribute's `_` becomes `-`, one at the end of its name is dropped, None leaves it out.

    Example:
        >>> element("p", "a < b", class_="note", aria_label="x")
        '<p class="note" aria-label="x">a &lt; b</p>'
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{joined(*children)}</{tag}>")


def _value(value: str | float) -> str:
    return escaped(value) if isinstance(value, str) else coordinate(value)


def coordinate(value: float) -> str:
    """Return a number of pixels to a tenth, without needless digits: the same text on every machine."""
    text = f"{value:.1f}"
    text = text.removesuffix(".0")
    return "0" if text == "-0" else text
