"""A page: its headline with the facts, sections of figures, and the numbers of each figure as a table below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.reports.markup import Markup, element, joined
from loratools.reports.style import sheet
from loratools.version import __version__

_HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under headings; the first column, or the `names` first, are names, the others stand right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def draw(self) -> Markup:
        """Return the table, which scrolls by itself where it is wider than the page."""
        head = element("tr", *(self._cell("th", i, heading) for i, heading in enumerate(self.headings)))
        body = (element("tr", *(self._cell("td", i, text) for i, text in enumerate(row))) for row in self.rows)
        table = element("table", element("thead", head), element("tbody", *body))
        return element("div", table, class_="scroll", tabindex="0", role="region", aria_label="table of numbers")

    def _cell(self, tag: str, column: int, text: str) -> Markup:
        content = element("bdi", text) if column < self.names and tag == "td" else text
        return element(tag, content, class_="name" if column < self.names and tag == "td" else
                       None if column < self.names else "right")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its title, a sentence that says how to read it, and its numbers."""

    title: str
    drawing: Markup
    reading: str
    table: Table | None = None

    def draw(self) -> Markup:
        """Return the figure."""
        parts = [element("h3", self.title), self.drawing, element("figcaption", self.reading)]
        if self.table is not None:
            parts.append(element("details", element("summary", "The numbers"), self.table.draw()))
        return element("figure", *parts)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: what it is about, figures side by side, and a table that is always seen.

    `groups` are small figures, three beside each other, under a heading of their own.
    """

    heading: str
    text: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    groups: Sequence[tuple[str, Sequence[Figure]]] = ()

    def draw(self) -> Markup:
        """Return the section."""
        parts = [element("h2", self.heading), element("p", self.text)]
        if self.figures:
            parts.append(element("div", *(figure.draw() for figure in self.figures), class_="figures"))
        for heading, figures in self.groups:
            parts.append(element("h3", element("bdi", heading), class_="group"))
            parts.append(element("div", *(figure.draw() for figure in figures), class_="small"))
        if self.table is not None:
            parts.append(element("div", self.table.draw(), class_="whole"))
        return element("section", *parts)


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page: what it shows (`kind`), its name, its headline of one or two sentences, facts, and sections."""

    kind: str
    name: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    def draw(self) -> Markup:
        """Return the HTML document: it needs no other file, no network and no script, and has none."""
        facts = (
            element("div", element("dt", term), element("dd", words), class_="long" if len(words) > 34 else None)
            for term, words in self.facts
        )
        header = element(
            "header", element("p", self.kind, class_="kind"), element("h1", element("bdi", self.name)),
            element("p", self.lead, class_="lead"), element("dl", *facts),
        )  # fmt: skip
        footer = element(
            "footer", f"Made by loratools {__version__} from the files alone. Equal files give equal pages."
        )
        style = Markup(f"<style>{sheet()}</style></head><body>\n")
        title = element("title", f"{self.name}: {self.kind}")
        main, end = element("main", *(section.draw() for section in self.sections)), Markup("\n")
        return joined(Markup(_HEAD), title, style, header, end, main, end, footer, Markup("</body></html>\n"))
