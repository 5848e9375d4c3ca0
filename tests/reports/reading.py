"""A page as its reader has it: headings, tables with their numbers, and the names of its figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Reading(HTMLParser):
    """What an HTML parser finds in a page. `cells` has the titles of drawn shapes, in their order."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._term = ""

    @classmethod
    def of(cls, page: str) -> Reading:
        """Read a page; every element must be closed."""
        reading = cls()
        reading.feed(page)
        reading.close()
        assert not reading._open, reading._open
        return reading

    @property
    def figures(self) -> list[str]:
        """The names that figures have for those who hear the page."""
        return [attributes["aria-label"] for tag, attributes in self.tags if attributes.get("role") == "img"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta":
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "style":
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        if inside == "title":
            self.titles.append(data)
        if inside in ("h1", "h2", "h3") or self._open[-2:] in (["h1", "bdi"], ["h3", "bdi"]):
            self.headings.append(data)
        if inside == "dt":
            self._term = data
        if inside == "dd":
            self.facts[self._term] = data
