"""What all figures have in common: how wide they are, how texts are measured and placed, and their frame."""

from __future__ import annotations

from loratools.reports.markup import Markup, coordinate, element
from loratools.reports.numbers import shortened, width

WIDTH = 344
"""Pixels across: the narrowest page has as much, so that no text is ever drawn smaller than it was meant."""

LETTER, SMALL = 6.7, 6.1
"""Pixels of a column of the fixed-width font, at 11 pixels and at 10; a little more than any such font takes."""


def frame(label: str, height: float, *parts: str, wide: float = WIDTH) -> Markup:
    """Return a drawing: an image by the name `label` for those who hear the page, its parts for those who see it."""
    box = f"0 0 {wide:.0f} {height:.0f}"
    sides = {"width": f"{wide:.0f}", "height": f"{height:.0f}"}
    return element("svg", *parts, role="img", aria_label=label, viewBox=box, **sides)


def text(content: str, x: float, y: float, class_: str = "") -> Markup:
    """Return a text that begins at x; the classes `e` and `m` have it end there, or stand in the middle."""
    return element("text", content, x=x, y=y, class_=class_ or None)


def fitted(name: str, columns: int, x: float, y: float, class_: str = "") -> Markup:
    """Return a name that takes at most so many columns of the font; the whole of it shows on hovering."""
    short = shortened(name, columns)
    title = element("title", name) if short != name else ""
    return element("text", title, short, x=x, y=y, class_=f"n {class_}".strip())


def upright(name: str, columns: int, x: float, y: float) -> Markup:
    """Return a name that is read from below, and ends above (x, y)."""
    short = shortened(name, columns)
    title = element("title", name) if short != name else ""
    return element("text", title, short, class_="n", transform=f"translate({x:.1f} {y:.1f}) rotate(-90)")


def widest(names: tuple[str, ...]) -> int:
    """Return how many columns of the font the widest of some names takes."""
    return max(map(width, names), default=0)


def box(class_: str, x: float, y: float, wide: float, high: float, title: str = "") -> Markup:
    """Return a rectangle, in which hovering shows the title."""
    said = element("title", title) if title else ""
    sides = tuple(map(coordinate, (x, y, wide, high)))
    return element("path", said, class_=class_, d="M{} {}h{}v{}H{}z".format(*sides, sides[0]))


def swatch(class_: str) -> Markup:
    """Return a small square in a colour of a scale, for a legend."""
    square = element("path", class_=class_, d="M0 0h12v12h-12z")
    return element("svg", square, width="12", height="12", viewBox="0 0 12 12", aria_hidden="true")


def legend(class_: str, *entries: tuple[Markup, str]) -> Markup:
    """Return a legend as a list: a drawing and what it stands for."""
    items = (element("li", drawing, " ", element("bdi", words)) for drawing, words in entries)
    return element("ul", *items, class_=f"legend {class_}".strip())
