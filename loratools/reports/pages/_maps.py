"""Heat maps of numbers by layer and projection, with their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from loratools.reports.arrange import Grid, arranged
from loratools.reports.charts.heat import Heat, key
from loratools.reports.markup import Markup, element, joined
from loratools.reports.numbers import number, shortened
from loratools.reports.page import Figure, Table
from loratools.reports.scale import Scale

_NAME = 28  # columns of a name in the title of a cell

Several = Callable[[Sequence[str]], float]
"""The number of a cell from the modules in it."""


def layer_map(
    title: str, what: str, reading: str, modules: Sequence[str], several: Several, *,
    show: Callable[[float], str] = number, signed: bool = False, scale: Scale | None = None,
) -> Figure:  # fmt: skip
    """Return a figure of one number for each module: a heat map for each sort of layer, and a table.

    `what` names the number; `several` gives that of a cell, which has one module, or more where a model has more layers
    than a page has lines.
    """
    grids = arranged(modules)
    numbers = [{cell: several(names) for cell, names in grid.members.items()} for grid in grids]
    scale = scale or Scale.of([value for cells in numbers for value in cells.values()], signed=signed)
    drawings = [
        _drawing(grid, cells, f"{title}: heat map of {what} by layer and projection", scale, show)
        for grid, cells in zip(grids, numbers, strict=True)
    ]
    together = max(grid.together for grid in grids)
    if together > 1:
        reading += f" Each line stands for up to {together} layers."
    table = _table(grids, numbers, show)
    return Figure(title, joined(*drawings, key(scale, show)), reading, table)


def _drawing(
    grid: Grid, cells: Mapping[tuple[int, int], float], label: str, scale: Scale,
    show: Callable[[float], str],
) -> Markup:  # fmt: skip
    def title(row: str, column: str, value: float) -> str:
        return f"{' '.join(shortened(name, _NAME) for name in (row, column) if name)}: {show(value)}"

    heat = Heat(label, grid.rows, grid.labels, cells, scale, title)
    heading = element("h4", element("bdi", grid.heading), class_="n") if grid.heading else Markup("")
    return joined(heading, heat.draw())


def _table(
    grids: Sequence[Grid], numbers: Sequence[Mapping[tuple[int, int], float]], show: Callable[[float], str]
) -> Table:
    """Return the cells as a table: of one grid as it is drawn, of several a line for each cell."""
    if len(grids) == 1:
        (grid,), (cells,) = grids, numbers
        rows = [
            [row, *(show(cells[i, j]) if (i, j) in cells else "" for j in range(len(grid.columns)))]
            for i, row in enumerate(grid.rows)
        ]
        return Table([grid.heading or "module", *(label or "value" for label in grid.labels)], rows)
    rows = [
        [grid.heading.replace("*", grid.rows[i]) if grid.heading else grid.rows[i], grid.columns[j], show(value)]
        for grid, cells in zip(grids, numbers, strict=True)
        for (i, j), value in cells.items()
    ]
    return Table(["layer", "projection", "value"], rows, 2)


def middle(values: Mapping[str, float]) -> Several:
    """Return what gives the median of several modules."""
    return lambda names: median(values[name] for name in names)


def in_the_middle(modules: Iterable[str], weight: Callable[[str], float]) -> list[str]:
    """Return the modules of the layer in the middle, those of most `weight` first."""
    grid = max(arranged(modules), key=lambda grid: len(grid.members))
    rows = sorted({row for row, _ in grid.members})
    names = [name for (row, _), members in grid.members.items() if row == rows[len(rows) // 2] for name in members]
    return sorted(names, key=lambda name: -weight(name))
