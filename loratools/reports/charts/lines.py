"""Lines over two axes, with a mark at each point that tells its numbers on hovering."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratools.reports.charts.drawing import WIDTH, frame, legend, text
from loratools.reports.markup import Markup, coordinate, element
from loratools.reports.numbers import number
from loratools.reports.scale import decades, ticks

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 236.0, 48.0, 12.0, 22.0, 40.0
_MARKS = 24  # marks on a line
_FEW = 48  # beyond, an axis of whole numbers doubles from mark to mark
COLOURS = 8
"""Lines that a figure can tell apart, by colour, dashes and their place in the legend."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line by its name, through points (x, y) of ascending x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Lines:
    """What a line chart shows; `across` and `up` name its axes, `label` says what it is to those who hear the page.

    A `logarithmic` y axis leaves out numbers that are not above 0. `low` and `high` are the least that the y axis
    spans, `show` writes its numbers. x are whole numbers.
    """

    label: str
    across: str
    up: str
    lines: Sequence[Line]
    logarithmic: bool = False
    low: float = 0.0
    high: float = 0.0
    show: Callable[[float], str] = number

    def draw(self) -> Markup:
        """Return the drawing."""
        points = [point for line in self.lines for point in line.points if self._can(point[1])]
        if not points:
            return Markup("")
        left, right = min(x for x, _ in points), max(x for x, _ in points)
        marks = self._marks([y for _, y in points])
        heights = [self._height(mark) for mark in marks]
        low, high = min(heights), max(heights)

        wide = left > 0 and right > _FEW  # most of what there is to see happens at the first few
        place: Callable[[float], float] = math.log2 if wide else lambda x: x

        def at_x(x: float) -> float:
            return _LEFT + (WIDTH - _LEFT - _RIGHT) * (place(x) - place(left)) / (place(right) - place(left) or 1)

        def at_y(y: float) -> float:
            return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (self._height(y) - low) / (high - low or 1)

        parts = [text(self.up, 0, 11, "a")]
        for mark in marks:
            parts.append(element("path", class_="g", d=f"M{_LEFT:.0f} {at_y(mark):.1f}H{WIDTH - _RIGHT:.0f}"))
            parts.append(text(power(mark) if self.logarithmic else self.show(mark), _LEFT - 7, at_y(mark) + 3.5, "e"))
        for x in _doubling(right) if wide else ticks(left, right, 6, integers=True) if right > left else [left]:
            parts.append(text(f"{x:.0f}", at_x(x), _HEIGHT - _BOTTOM + 16, "m"))
        parts.append(text(self.across, (_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT - 6, "a m"))
        for i, line in enumerate(self.lines):
            parts += self._line(line, f"l{i % COLOURS}", at_x, at_y)
        return frame(self.label, _HEIGHT, *parts)

    def key(self) -> Markup:
        """Return the legend, nothing for a single line."""
        if len(self.lines) < 2:
            return Markup("")
        return legend("lines", *((sample(f"l{i % COLOURS}"), line.name) for i, line in enumerate(self.lines)))

    def _line(
        self, line: Line, class_: str, at_x: Callable[[float], float], at_y: Callable[[float], float]
    ) -> list[Markup]:
        seen = [(x, y) for x, y in line.points if self._can(y)]
        if not seen:
            return []
        path = " ".join(f"{coordinate(at_x(x))} {coordinate(at_y(y))}" for x, y in seen)
        marked = {round(at_x(x) / (WIDTH / _MARKS)): (x, y) for x, y in reversed(seen)}
        dots = [
            element(
                "circle", element("title", f"{line.name}: {self.across} {x:.0f}, {self.show(y)}".removeprefix(": ")),
                cx=at_x(x), cy=at_y(y), r=2.6, class_=class_,
            )
            for x, y in sorted(marked.values())
        ]  # fmt: skip
        return [element("polyline", class_=class_, points=path), *dots]

    def _can(self, y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not self.logarithmic)

    def _height(self, y: float) -> float:
        return math.log10(y) if self.logarithmic else y

    def _marks(self, values: Sequence[float]) -> list[float]:
        """Return the numbers on the y axis, which span every point."""
        if self.logarithmic:
            return [10.0**power for power in decades(min(values), max(values))]
        low, high = min(self.low, *values), max(self.high, *values)
        step = ticks(low, high)
        size = step[1] - step[0] if len(step) > 1 else 1.0
        return [low] * (low < step[0] - size / 1e6) + step + [step[-1] + size] * (high > step[-1] + size / 1e6)


def _doubling(most: float) -> list[float]:
    return [float(1 << i) for i in range(int(most).bit_length())]


def power(value: float) -> str:
    """Return a power of ten as an axis has it: plain near 1, else with its exponent above.

    Example:
        >>> power(0.1), power(1e-6)
        ('0.1', '10⁻⁶')
    """
    if 1e-3 <= value <= 1e3:
        return number(value)
    return "10" + f"{round(math.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def sample(class_: str) -> Markup:
    """Return a short piece of a line, for a legend."""
    piece = element("path", class_=class_, d="M1 6H25")
    return element("svg", piece, width="26", height="12", viewBox="0 0 26 12", aria_hidden="true")
