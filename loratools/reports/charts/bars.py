"""A bar for each row, from 0, with its number beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratools.reports.charts.drawing import SMALL, WIDTH, box, fitted, frame, text, widest
from loratools.reports.markup import Markup
from loratools.reports.numbers import number, width

_HIGH = 20.0


@dataclass(frozen=True, slots=True)
class Bars:
    """What a bar chart shows: names with numbers that are not negative, written by `show`; `full` is a whole bar."""

    label: str
    rows: Sequence[tuple[str, float]]
    full: float | None = None
    show: Callable[[float], str] = number
    colour: str = "b"

    def draw(self) -> Markup:
        """Return the drawing."""
        names = tuple(name for name, _ in self.rows)
        columns = min(28, widest(names))
        left = columns * SMALL + 8
        shown = [self.show(value) for _, value in self.rows]
        room = WIDTH - left - max(map(width, shown), default=0) * SMALL - 12
        full = self.full or max((value for _, value in self.rows), default=0.0) or 1.0
        parts = []
        for i, ((name, value), words) in enumerate(zip(self.rows, shown, strict=True)):
            top = i * _HIGH
            long = max(1.0, room * min(1.0, value / full)) if value > 0 else 0.0
            parts += [
                fitted(name, columns, left - 8, top + 13, "r e"),
                box(self.colour, left, top + 3, long, _HIGH - 6, f"{name}: {words}"),
                text(words, left + long + 6, top + 13),
            ]
        return frame(self.label, len(self.rows) * _HIGH + 2, *parts)
