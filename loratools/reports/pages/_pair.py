"""Two adapters beside each other: cosines, and the subspaces that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from loratools.adapter.naming.compact import compact
from loratools.reports.charts.heat import Heat, key
from loratools.reports.charts.lines import Line, Lines
from loratools.reports.markup import joined
from loratools.reports.page import Figure, Section, Table
from loratools.reports.pages._maps import in_the_middle, layer_map, middle
from loratools.reports.scale import Scale, few_ranks
from loratools.surgery.compare import Comparison, ModuleComparison
from loratools.surgery.paper import Grid

_ROWS = 24  # rows of a table that is always seen


def sections(names: tuple[str, str], found: Comparison, pictured: int, prefix: str = "") -> Iterator[Section]:
    """Yield the sections of a comparison, which was made with `paper`; φ(i, j) is drawn of `pictured` modules.

    `prefix` begins their headings, where a page has those of several pairs, and less of each.
    """
    modules = {module.module: module for module in found.modules}
    yield _likeness(modules, prefix)
    if moving := {name: module for name, module in modules.items() if all(module.ranks)}:
        yield _subspaces(names, moving, pictured, prefix)


def phi(value: float) -> str:
    """Return a similarity or a cosine as a page has it."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Return a cosine with its sign."""
    return f"{value:+.3f}".replace("-", "−").replace("−0.000", "0.000").replace("+0.000", "0.000")


def overlap(found: Comparison) -> str:
    """Return how much of the input subspaces is shared, beside chance, as a sentence."""
    moving = [module for module in found.modules if all(module.ranks)]
    if not moving:
        return "One of them changes nothing."
    shared, chance = median(map(_inputs, moving)), median(module.chance[0] for module in moving)
    share, control = (f"{100 * value:.3g} %" for value in (shared, chance))
    which = "their median module" if len(moving) > 1 else "the one module"
    return f"In {which} they share {share} of the input directions; chance alone would give {control}."


def _inputs(module: ModuleComparison) -> float:
    return module.input_overlap


def _outputs(module: ModuleComparison) -> float:
    return module.output_overlap


def _likeness(modules: Mapping[str, ModuleComparison], prefix: str) -> Section:
    def joint(names: Sequence[str]) -> float:
        inner = math.fsum(modules[name].cosine * math.prod(modules[name].norms) for name in names)
        norms = [math.fsum(modules[name].norms[side] ** 2 for name in names) for side in (0, 1)]
        return inner / math.sqrt(norms[0] * norms[1]) if all(norms) else 0.0

    overlaps = [
        layer_map(
            f"Shared {which} directions, φ", "φ",
            f"Which share of the smaller adapter's {which} directions lies among the other's; 1 is all of them.",
            list(modules), middle({name: of(module) for name, module in modules.items()}), show=phi,
        )
        for which, of in (("input", _inputs), ("output", _outputs))[: 1 if prefix else 2]
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
    chosen = in_the_middle(modules, lambda name: math.prod(modules[name].norms))[:pictured]
    text = (
        "φ(i, j) of section 7.2 of the LoRA paper: how much of the i leading directions of one adapter lies among the "
        "j leading ones of the other. Two random matrices of the same shape are the control (its Figures 3 and 4)."
    )
    groups = [(name, list(_grids(names, modules[name]))) for name in chosen]
    return Section(f"{prefix}Which directions they share", text, [_falling(modules)], groups=groups)


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
        lines, show=lambda value: f"{value:.3g}",
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


def _grids(names: tuple[str, str], module: ModuleComparison) -> Iterator[Figure]:
    """Yield φ(i, j) of ΔW, of A alone and of chance, in the same colours."""
    found = {"ΔW, input side": module.input_similarity}
    if module.paper:
        found |= {"A alone, as in the paper": module.paper.factor_similarity, "Random control": module.paper.control}
    scale = Scale.of([value for grid in found.values() for row in grid for value in row])
    yield from (_grid(title, grid, names, scale) for title, grid in found.items() if grid)


def _grid(title: str, values: Grid, names: tuple[str, str], scale: Scale) -> Figure:
    down, across = few_ranks(len(values)), few_ranks(len(values[0]))
    cells = {(i, j): values[a - 1][b - 1] for i, a in enumerate(down) for j, b in enumerate(across)}
    labels = [str(i) for i in down], [str(j) for j in across]
    heat = Heat(
        f"Heat map of φ(i, j): {title}", *labels, cells, scale, lambda i, j, value: f"φ({i}, {j}) = {phi(value)}"
    )
    rows = [[str(a), *(phi(values[a - 1][b - 1]) for b in across)] for a in down]
    return Figure(
        title, joined(heat.draw(square=True), key(scale)),
        f"φ(i, j) with i down, of {names[0]}, and j across, of {names[1]}.",
        Table(["i \\ j", *map(str, across)], rows),
    )  # fmt: skip


def alone(names: tuple[str, str], found: Comparison) -> Iterator[Section]:
    """Yield what only one of them changes, nothing where both change the same modules."""
    rows = [[name, pattern] for name, only in zip(names, found.only, strict=True) for pattern in compact(only)]
    if rows:
        more = [["", f"and {len(rows) - _ROWS} more"]] if len(rows) > _ROWS else []
        text = "These modules are in one adapter only. They count as differences in the cosine of the whole."
        table = Table(["adapter", "modules"], [*rows[:_ROWS], *more], 2)
        yield Section("What only one of them changes", text, table=table)
