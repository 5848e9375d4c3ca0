"""Two adapters beside each other: cosines, the subspaces that they share, and Table 7 of the LoRA paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from loratools.reports.arrange import arranged
from loratools.reports.charts.heat import Heat, key
from loratools.reports.charts.lines import Line, Lines
from loratools.reports.markup import joined
from loratools.reports.numbers import number, percent, plural, whole
from loratools.reports.page import Figure, Section, Table
from loratools.reports.pages._maps import layer_map, middle
from loratools.reports.scale import Scale, few_ranks
from loratools.surgery.compare import Comparison, ModuleComparison
from loratools.surgery.paper import Grid, Projection

_ROWS = 24  # rows of a table that is always seen
_SHARE = Scale(0.0, 1.0)


def sections(names: tuple[str, str], found: Comparison, pictured: int, prefix: str = "") -> Iterator[Section]:
    """Yield the sections of a comparison, which was made with `paper`; φ(i, j) is drawn of `pictured` modules.

    `prefix` begins their headings, where a page has those of several pairs.
    """
    modules = {module.module: module for module in found.modules}
    if alone := _alone(names, found):
        yield alone
    yield _likeness(modules, prefix)
    if moving := {name: module for name, module in modules.items() if all(module.ranks)}:
        yield _subspaces(names, moving, pictured, prefix)
    if projections := [(module, side, row) for module in found.modules for side, row in _projections(module)]:
        yield _table_7(names, modules, projections, prefix)


def phi(value: float) -> str:
    """Return a similarity or a cosine as a page has it."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Return a cosine with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def overlap(found: Comparison) -> str:
    """Return how much of the input subspaces is shared, beside chance, as a sentence."""
    moving = [module for module in found.modules if all(module.ranks)]
    if not moving:
        return "One of them changes nothing."
    shared, chance = median(map(_inputs, moving)), median(module.chance[0] for module in moving)
    middling = "the median of their modules" if len(moving) > 1 else "their module"
    return f"In {middling} {percent(shared)} of the input directions are shared; chance gives {percent(chance)}."


def _inputs(module: ModuleComparison) -> float:
    return module.input_overlap


def _likeness(modules: Mapping[str, ModuleComparison], prefix: str) -> Section:
    def joint(names: Sequence[str]) -> float:
        inner = math.fsum(modules[name].cosine * math.prod(modules[name].norms) for name in names)
        norms = [math.fsum(modules[name].norms[side] ** 2 for name in names) for side in (0, 1)]
        return inner / math.sqrt(norms[0] * norms[1]) if all(norms) else 0.0

    overlaps = [
        layer_map(
            f"Shared {which} directions, φ", "φ",
            f"Which share of the smaller adapter's {which} directions lies among the other's; 1 is all of them.",
            list(modules), middle({name: of(module) for name, module in modules.items()}), show=phi, scale=_SHARE,
        )
        for which, of in (("input", _inputs), ("output", lambda module: module.output_overlap))
    ]  # fmt: skip
    cosines = layer_map(
        "Cosine of the two ΔW", "cosine", "+1: the same change; 0: unrelated; −1: one undoes the other.",
        list(modules), joint, show=signed, signed=True,
    )  # fmt: skip
    text = (
        "The cosine tells whether both push a weight the same way. φ tells whether they work in the same directions at "
        "all, even where they push differently."
    )
    return Section(f"{prefix}How alike, module by module", text, [cosines, *overlaps])


def _subspaces(names: tuple[str, str], modules: Mapping[str, ModuleComparison], pictured: int, prefix: str) -> Section:
    figures = [_falling(modules)]
    for module in _chosen(modules, pictured):
        figures += _grids(names, modules[module])
    text = (
        "φ(i, j) of section 7.2 of the LoRA paper: how much of the i leading directions of one adapter lies among the "
        "j leading ones of the other. Two random matrices of the same shape are the control (its Figures 3 and 4)."
    )
    return Section(f"{prefix}Which directions they share", text, figures)


def _falling(modules: Mapping[str, ModuleComparison]) -> Figure:
    """Return the medians of φ(i, i) over all modules, of ΔW, of A alone and of chance."""
    beside = [module.paper for module in modules.values() if module.paper]
    kinds: list[tuple[str, list[Grid]]] = [
        ("ΔW, input side", [module.input_similarity for module in modules.values()]),
        ("ΔW, output side", [module.output_similarity for module in modules.values()]),
        ("A alone", [each.factor_similarity for each in beside if each.factor_similarity]),
        ("random control", [each.control for each in beside if each.control]),
    ]
    lines = [Line(name, _diagonal(grids)) for name, grids in kinds if grids]
    chart = Lines(
        "Line chart of φ(i, i), medians over modules, of ΔW, of A alone and of two random matrices", "i", "φ(i, i)",
        lines, low=0.0, high=1.0, show=lambda value: f"{value:.3g}",
    )  # fmt: skip
    steps = few_ranks(max(len(line.points) for line in lines))
    rows = [
        [line.name, *(phi(dict(line.points)[i]) if i in dict(line.points) else "" for i in steps)] for line in lines
    ]
    return Figure(
        "How much the i leading directions share", joined(chart.draw(), chart.key()),
        "Above the random control, the adapters agree on directions; the leading ones usually agree most.",
        Table(["φ(i, i) at i", *map(str, steps)], rows),
    )  # fmt: skip


def _diagonal(grids: Sequence[Grid]) -> list[tuple[float, float]]:
    sides = sorted(min(len(grid), len(grid[0])) for grid in grids)
    return [
        (float(i + 1), median(grid[i][i] for grid in grids if min(len(grid), len(grid[0])) > i))
        for i in range(sides[len(sides) // 2])
    ]


def _chosen(modules: Mapping[str, ModuleComparison], count: int) -> list[str]:
    """Return the modules of which φ(i, j) is drawn: of the layer in the middle, where both adapters change most."""
    grid = max(arranged(modules), key=lambda grid: len(grid.members))
    rows = sorted({row for row, _ in grid.members})
    middle_row = rows[len(rows) // 2]
    names = [name for (row, _), members in grid.members.items() if row == middle_row for name in members]
    return sorted(names, key=lambda name: -math.prod(modules[name].norms))[:count]


def _grids(names: tuple[str, str], module: ModuleComparison) -> Iterator[Figure]:
    yield _grid(f"ΔW of {module.module}", "ΔW", module.input_similarity, names, "of ΔW, input side.")
    if module.paper and module.paper.factor_similarity:
        yield _grid(
            f"A of {module.module}", "A", module.paper.factor_similarity, names, "of A alone, as the paper has it."
        )
    if module.paper and module.paper.control:
        reading = "of two random matrices of these shapes: what chance gives."
        yield _grid(f"Random control of {module.module}", "random", module.paper.control, names, reading)


def _grid(title: str, what: str, values: Grid, names: tuple[str, str], reading: str) -> Figure:
    down, across = few_ranks(len(values)), few_ranks(len(values[0]))
    cells = {(i, j): values[a - 1][b - 1] for i, a in enumerate(down) for j, b in enumerate(across)}
    labels = [str(i) for i in down], [str(j) for j in across]
    heat = Heat(
        f"Heat map of φ(i, j), {what}", *labels, cells, _SHARE, lambda i, j, value: f"φ({i}, {j}) = {phi(value)}"
    )
    rows = [[str(a), *(phi(values[a - 1][b - 1]) for b in across)] for a in down]
    return Figure(
        title, joined(heat.draw(square=True), key(_SHARE)),
        f"φ(i, j) {reading} i goes down ({names[0]}), j across ({names[1]}).",
        Table(["i \\ j", *map(str, across)], rows),
    )  # fmt: skip


def _projections(module: ModuleComparison) -> Iterator[tuple[int, Projection]]:
    if module.paper:
        yield from ((side, row) for side, row in enumerate(module.paper.projections) if row is not None)


def _table_7(
    names: tuple[str, str], modules: Mapping[str, ModuleComparison],
    projections: Sequence[tuple[ModuleComparison, int, Projection]], prefix: str,
) -> Section:  # fmt: skip
    figures = []
    for side, name in enumerate(names):
        amplified = {each.module: row.amplification for each, which, row in projections if which == side}
        if finite := {module: value for module, value in amplified.items() if math.isfinite(value)}:
            figures.append(
                layer_map(
                    f"Amplification by {name}", "‖ΔW‖ / ‖UᵀWV‖",
                    "How many times stronger the adapter is, in its own directions, than the base was there.",
                    list(finite), middle(finite),
                )
            )  # fmt: skip
    seen = set(_chosen(modules, _ROWS // 2)) if len(projections) > _ROWS else set(modules)
    rows = [
        [each.module, names[side], whole(row.rank), *map(number, (
            row.weight_norm, row.update_norm, row.of_update, row.of_weight, row.of_random, row.amplification))]
        for each, side, row in projections
        if each.module in seen
    ]  # fmt: skip
    left = len({each.module for each, _, _ in projections} - seen)
    text = (
        "How strong the base W is in r directions: those of ΔW, its own leading ones, and random ones. An adapter that "
        "strengthens what the base hardly uses has ‖UᵀWV‖ of ΔW far below that of W (Table 7 of the paper)."
        + (
            f" The table has the layer in the middle; {plural(left, 'other module')} are in the figures."
            if left
            else ""
        )
    )
    headings = ["module", "adapter", "r", "‖W‖", "‖ΔW‖", "of ΔW", "of W", "random", "amplified"]
    return Section(f"{prefix}What is amplified", text, figures, Table(headings, rows, 2))


def _alone(names: tuple[str, str], found: Comparison) -> Section | None:
    """Return what only one of them changes; None where both change the same modules."""
    rows = [[name, module] for name, only in zip(names, found.only, strict=True) for module in only[: _ROWS // 2]]
    rows += [
        [name, f"and {len(only) - _ROWS // 2} more"]
        for name, only in zip(names, found.only, strict=True)
        if len(only) > _ROWS // 2
    ]
    text = "These modules are in one adapter only. They count as differences in the cosine of the whole."
    return Section("What only one of them changes", text, table=Table(["adapter", "module"], rows, 2)) if rows else None
