"""Who resembles whom: the cosine of every two of several adapters, like ones beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools.reports.charts.heat import Heat, key
from loratools.reports.markup import element, joined
from loratools.reports.page import Figure, Table
from loratools.reports.pages._pair import signed
from loratools.reports.scale import Scale

_NAMED = 12
"""Adapters whose names stand at the figure; of more their numbers do, with a list below."""

Cosines = Mapping[tuple[int, int], float]
"""(i, j) with i < j -> the cosine of adapters i and j; pairs that cannot be compared are left out."""


def ordered(count: int, cosines: Cosines) -> list[int]:
    """Return an order with like ones beside each other: groups are joined by their mean cosine, the most alike first.

    Of each joined pair the ends that are more alike come together. Equal inputs give one order.
    """
    groups = [[i] for i in range(count)]

    def alike(one: Sequence[int], other: Sequence[int]) -> float:
        values = [cosines.get((min(i, j), max(i, j)), -1.0) for i in one for j in other]
        return sum(values) / len(values)

    while len(groups) > 1:
        pairs = ((alike(groups[a], groups[b]), -a, -b) for a in range(len(groups)) for b in range(a + 1, len(groups)))
        _, a, b = max(pairs)
        first, second = groups[-a], groups[-b]
        turns = [(x, y) for x in (first, first[::-1]) for y in (second, second[::-1])]
        best = max(turns, key=lambda turn: alike(turn[0][-1:], turn[1][:1]))
        groups = [group for i, group in enumerate(groups) if i not in (-a, -b)] + [[*best[0], *best[1]]]
    return groups[0] if groups else []


def matrix(names: Sequence[str], cosines: Cosines) -> Figure:
    """Return the figure of all cosines, with like adapters beside each other."""
    order = ordered(len(names), cosines)
    cells: dict[tuple[int, int], float] = {}
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            value = 1.0 if i == j else cosines.get((min(i, j), max(i, j)))
            cells |= {(row, column): value} if value is not None else {}
    named = len(names) <= _NAMED
    numbers = [str(row + 1) for row in range(len(order))]
    rows = [f"{names[i]}  {number}" if named else number for number, i in zip(numbers, order, strict=True)]
    scale = Scale(-1.0, 1.0, signed=True)

    def title(row: str, column: str, value: float) -> str:
        one, other = (names[order[int(label.split()[-1]) - 1]] for label in (row, column))
        return f"{one} and {other}: {signed(value)}"

    heat = Heat("Heat map of the cosines of every two adapters", rows, numbers, cells, scale, title)
    listed = [element("li", element("bdi", names[i])) for i in order]
    legend = element("ol", *listed, class_="names")
    table = Table(
        ["", *numbers],
        [
            [f"{numbers[row]} {names[i]}", *(signed(cells[row, column]) if (row, column) in cells else ""
                                             for column in range(len(order)))]
            for row, i in enumerate(order)
        ],
    )  # fmt: skip
    return Figure(
        "Cosine of every two", joined(heat.draw(square=True), key(scale, signed), *([] if named else [legend])),
        "Like adapters stand beside each other: a square of one strong colour is a family. What has nothing in common "
        "stays pale.",
        table,
    )  # fmt: skip
