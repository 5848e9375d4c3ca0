"""Table 7 of the LoRA paper: how strong the base is in an adapter's directions, its own, and random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratools.reports.numbers import number, plural, whole
from loratools.reports.page import Section, Table
from loratools.reports.pages._maps import in_the_middle, layer_map, middle
from loratools.surgery.compare import Comparison
from loratools.surgery.paper import Projection

_ROWS, _PICTURED = 24, 4
_HEADINGS = ("module", "adapter", "r", "‖W‖", "‖ΔW‖", "of ΔW", "of W", "random", "amplified")


def projections(found: Comparison, side: int) -> dict[str, Projection]:
    """Return the row of each module of one side of a comparison, which was made with `paper` and a base."""
    rows = {module.module: module.paper.projections[side] for module in found.modules if module.paper}
    return {module: row for module, row in rows.items() if row is not None}


def table_7(names: Sequence[str], rows: Sequence[Mapping[str, Projection]]) -> Section:
    """Return the section of several adapters; `rows` are those of each by module."""
    figures = []
    for name, by_module in list(zip(names, rows, strict=True))[:_PICTURED]:
        if finite := {each: row.amplification for each, row in by_module.items() if math.isfinite(row.amplification)}:
            figures.append(
                layer_map(
                    f"Amplification by {name}", "‖ΔW‖ / ‖UᵀWV‖",
                    "How many times stronger the adapter is, in its own directions, than the base was there.",
                    list(finite), middle(finite),
                )
            )  # fmt: skip
    modules = list(dict.fromkeys(module for by_module in rows for module in by_module))
    norms = {module: max(row[module].update_norm for row in rows if module in row) for module in modules}
    seen = set(in_the_middle(modules, norms.__getitem__) if sum(map(len, rows)) > _ROWS else modules)
    table = [
        [module, name, whole(row.rank), *map(number, (
            row.weight_norm, row.update_norm, row.of_update, row.of_weight, row.of_random, row.amplification))]
        for module in modules
        if module in seen
        for name, by_module in zip(names, rows, strict=True)
        if (row := by_module.get(module)) is not None
    ]  # fmt: skip
    left = len(modules) - len(seen)
    text = (
        "How strong the base W is in r directions: those of ΔW, its own leading ones, and random ones. An adapter that "
        "strengthens what the base hardly uses has ‖UᵀWV‖ of ΔW far below that of W (Table 7 of the paper)."
        + (f" The table has the layer in the middle; the figures also {plural(left, 'other module')}." if left else "")
    )
    return Section("What is amplified", text, figures, table=Table(_HEADINGS, table[:_ROWS], 2))
