"""A heat map: a colour for each cell of rows and columns, its number on hovering."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loratools.reports.charts.drawing import LETTER, SMALL, WIDTH, box, fitted, frame, text, upright, widest
from loratools.reports.markup import Markup, element, joined
from loratools.reports.numbers import number, width
from loratools.reports.scale import Scale

_LABEL = 22  # columns of the font that the name of a row may take
_TOP = 18  # columns that an upright name may take
_GAP = 1
_TALLEST = 17.0
_LEAST = 120.0  # pixels across, so that no name is wider than the drawing


@dataclass(frozen=True, slots=True)
class Heat:
    """What a heat map shows: `values` by (row, column), cells without one stay empty.

    `label` says what it is to those who hear the page, `title` is the text of a cell on hovering: of its row, its
    column and its value.
    """

    label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]
    scale: Scale
    title: Callable[[str, str, float], str]

    def draw(self, *, square: bool = False) -> Markup:
        """Return the drawing; the cells of a `square` one are as high as they are wide."""
        label = min(_LABEL, widest(tuple(self.rows)))
        left = float(math.ceil(label * SMALL + 8)) if label else 0.0
        wide = float(min(64, (WIDTH - left - 2) // max(1, len(self.columns))))
        high = min(wide, _TALLEST) if square else _high(len(self.rows))
        wide = high if square else wide
        head, top = self._head(left, wide)
        return frame(
            self.label, top + len(self.rows) * high + 4, *head, *self._labels(left, top, high, label),
            *self._cells(left, top, wide, high), wide=max(_LEAST, min(WIDTH, left + len(self.columns) * wide + 4)),
        )  # fmt: skip

    def _head(self, left: float, wide: float) -> tuple[list[Markup], float]:
        """Return the names of the columns, and how much height they take."""
        if not any(self.columns):
            return [], 2.0
        if all(width(name) * LETTER <= wide - 2 for name in self.columns):
            middle = enumerate(self.columns)
            return [text(name, left + (i + 0.5) * wide, 12, "n m") for i, name in middle], 18.0
        longest = min(_TOP, widest(tuple(self.columns)))
        top = float(math.ceil(longest * LETTER + 6))
        every = -(-12 // int(max(1, wide)))
        return [
            upright(name, _TOP, left + (i + 0.5) * wide + 4, top - 5)
            for i, name in enumerate(self.columns)
            if i % every == 0
        ], top  # fmt: skip

    def _labels(self, left: float, top: float, high: float, columns: int) -> list[Markup]:
        every = -(-12 // int(max(1, high)))
        return [
            fitted(name, columns, left - 6, top + (i + 0.5) * high + 3.5, "r e")
            for i, name in enumerate(self.rows)
            if name and i % every == 0
        ]

    def _cells(self, left: float, top: float, wide: float, high: float) -> list[Markup]:
        return [
            box(
                self.scale.level(value), left + column * wide, top + row * high, wide - _GAP, high - _GAP,
                self.title(self.rows[row], self.columns[column], value),
            )
            for (row, column), value in sorted(self.values.items())
        ]  # fmt: skip


def _high(rows: int) -> float:
    return 20.0 if rows <= 12 else 16.0 if rows <= 24 else 13.0 if rows <= 40 else 12.0


def key(scale: Scale, show: Callable[[float], str] = number) -> Markup:
    """Return the legend of a scale: its colours in a row, between the numbers at its ends."""
    colours = [box(level, i * 16, 0, 16, 10) for i, level in enumerate(scale.levels())]
    wide = 16 * len(colours)
    strip = element(
        "svg", *colours, viewBox=f"0 0 {wide} 10", width=str(wide), height="10", role="img",
        aria_label=f"colours from {show(scale.low)} to {show(scale.high)}",
    )  # fmt: skip
    low, high = (re.sub(r"\.0+$|(?<=\.\d)0+$|(?<=\.\d\d)0+$", "", show(end)) for end in (scale.low, scale.high))
    ends = (element("span", low), strip, element("span", high))
    return element("div", joined(*ends), class_="key")
