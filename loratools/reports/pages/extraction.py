"""The page of an adapter that was extracted from a fine-tune: error, rank and class of every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loratools.adapter.model import Adapter
from loratools.adapter.naming.compact import compact
from loratools.reports.charts.bars import Bars
from loratools.reports.numbers import number, percent, plural, size, whole
from loratools.reports.page import Figure, Page, Section, Table
from loratools.reports.pages import _facts, _strength
from loratools.reports.pages._extracted import certificate, is_extraction, parameters
from loratools.reports.pages._maps import layer_map, middle
from loratools.reports.scale import Scale
from loratools.reports.subjects import Subjects
from loratools.surgery.extract.assemble import CLASSES
from loratools.surgery.extract.certify import Certification, certify
from loratools.surgery.extract.layers import Layer, beside_optimum, total
from loratools.surgery.spectrum import spectrum

NEEDS = "one adapter that extract-svd made; with its fine-tune and --base it is measured anew"
_SHOWN = 40


def fits(subjects: Subjects) -> bool:
    """Tell whether this is an extraction."""
    return is_extraction(subjects)


def page(subjects: Subjects) -> Page:
    """Make the page."""
    (subject,) = subjects.adapters
    base = subjects.base.model if subjects.base else None
    anew = None
    if base is not None and subjects.models:
        tuned, progress = subjects.models[0].model, subjects.progress
        anew = certify(tuned, base, subject.adapter, seed=subjects.seed, progress=progress)
    layers = anew.layers if anew else certificate(subject.adapter)
    summary, sums = _facts.summary_of(subject.adapter, subject.name), anew.total if anew else total(layers)
    stated = parameters(subject.adapter)
    facts = [
        ("captured", percent(sums.captured)),
        ("error", number(sums.error)),
        ("layers", whole(sums.layers)),
        ("rank", _facts.spread(sorted({float(layer.rank) for layer in layers}))),
        ("change ‖ΔW‖ / ‖W‖", percent(sums.delta_norm / sums.base_norm) if sums.base_norm else "none"),
        ("rounding's share of it", percent(sums.noise)),
        ("parameters", whole(summary.total.parameters)),
        ("size", f"{size(summary.total.nbytes)}, {', '.join(summary.dtypes)}"),
        ("base model", _facts.base_of(summary.base)),
        ("measured", f"anew on {subjects.models[0].name} and {subjects.base.name}" if anew and subjects.base else
         "by extract-svd, when it made the adapter"),
        ("made by", _facts.made_by(summary.provenance)),
    ]  # fmt: skip
    measured = spectrum(replace(subject.adapter, replacements={}))  # which have no spectrum, and need no warning
    _, use, smaller = list(_strength.sections(measured))[:3]
    sections = [_classes(subject.adapter, stated), _kept(layers), _change(layers), *_beside(anew), use, smaller]
    closer = " (extract-svd --tight proves a closer bound)" if not anew and stated.get("tight") is not True else ""
    lead = (
        f"It holds {percent(sums.captured)} of the change ‖ΔW‖² of {plural(sums.layers, 'layer')}. "
        f"Its error is {sums.error:.4g} of ‖ΔW‖: {beside_optimum(sums, closer)}."
    )
    return Page("Adapter extracted from a fine-tune", subject.name, lead, facts, sections)


def _classes(adapter: Adapter, stated: Mapping[str, object]) -> Section:
    """Return what became of every tensor: how many are in each class by the record, and which the adapter holds."""
    counts = stated.get("tensors")
    counted = {
        name: counts[name]
        for name in (*CLASSES, "missing")
        if isinstance(counts, Mapping) and isinstance(counts.get(name), int) and counts[name] >= 0
    }
    words = CLASSES | {"missing": "missing in the fine-tune"}
    bars = Bars(
        "Bars: how many tensors are in each class", [(words.get(name, name), count) for name, count in counted.items()],
        show=lambda count: whole(round(count)),
    )  # fmt: skip
    held = [("as factors", list(adapter.updates)), ("saved whole", list(adapter.replacements))]
    rows = [[pattern, name] for name, paths in held for pattern in compact(paths)]
    more = [[f"and {len(rows) - _SHOWN} more", ""]] if len(rows) > _SHOWN else []
    share, error = stated.get("dropped"), stated.get("error")
    numbers = isinstance(share, float) and isinstance(error, float) and 0 < share < math.inf and 0 < error < math.inf
    dropped = f" {share:.4g} of the whole change was left out, which makes the error {error:.4g}." if numbers else ""
    figure = Figure(
        "Tensors by class", bars.draw(), "Every tensor of the fine-tune is in exactly one class.",
        Table(["class", "tensors"], [[words.get(name, name), whole(count)] for name, count in counted.items()]),
    )  # fmt: skip
    text = f"How many tensors of the fine-tune the adapter holds, in which form, and which.{dropped}"
    return Section(
        "What became of every tensor", text, [figure] if counted else [],
        Table(["tensors in the adapter", "class"], [*rows[:_SHOWN], *more], 2),
    )  # fmt: skip


def _kept(layers: Sequence[Layer]) -> Section:
    by_name = {layer.module: layer for layer in layers}

    def error(names: Sequence[str]) -> float:
        return total(by_name[name] for name in names).error

    figures = [
        layer_map(
            "Error, ‖W′ − W − B·A‖ / ‖W′ − W‖", "error",
            "The stronger its colour, the more of that change is not in the adapter: 0.3 leaves out 9 % of ‖ΔW‖².",
            list(by_name), error,
        ),
    ]  # fmt: skip
    ranks = {name: float(layer.rank) for name, layer in by_name.items()}
    if len(set(ranks.values())) > 1:
        reading = "How many directions the adapter spends on each layer."
        figures.append(layer_map("Rank of each layer", "rank", reading, list(ranks), middle(ranks)))
    text = "The error is that of the factors as they are stored. What is captured of a layer's change is 1 − error²."
    return Section("How much of each layer it holds", text, figures)


def _change(layers: Sequence[Layer]) -> Section:
    by_name = {layer.module: layer for layer in layers}

    def relative(names: Sequence[str]) -> float:
        sums = total(by_name[name] for name in names)
        return sums.delta_norm / sums.base_norm if sums.base_norm else 0.0

    def noise(names: Sequence[str]) -> float:
        return total(by_name[name] for name in names).noise

    figures = [
        layer_map(
            "Change by the fine-tune, ‖ΔW‖ / ‖W‖", "‖ΔW‖/‖W‖",
            "How far full fine-tuning moved each weight, as a share of its own length.",
            list(by_name), relative, show=percent,
        ),
        layer_map(
            "Share of it that rounding explains", "noise",
            "Near 100 %, what looks like training is the rounding of the fine-tune's dtype: no rank can compress that.",
            list(by_name), noise, show=percent, scale=Scale(0.0, 1.0),
        ),
    ]  # fmt: skip
    text = "What full fine-tuning did, before any of it was left out."
    return Section("How large the change was", text, figures)


def _beside(anew: Certification | None) -> Iterator[Section]:
    """Yield the error beside the least there is, and what the adapter does not touch, where that was measured."""
    if anew is None:
        return
    least = {layer.module: best for layer, best in zip(anew.layers, anew.optimal, strict=True)}
    figure = layer_map(
        "Least error at these ranks", "least error", "What a truncated SVD of each layer's own rank would leave.",
        list(least), middle(least),
    )  # fmt: skip
    yield Section("Beside the optimum", "The best that any factors of these ranks could do.", [figure])
    rows = [[name, number(norm)] for name, norm in anew.uncovered]
    if rows:
        more = [[f"and {len(rows) - _SHOWN} more", ""]] if len(rows) > _SHOWN else []
        text = f"Changed tensors without an update: {percent(anew.uncovered_energy)} of the whole change ‖ΔW‖²."
        table = Table(["tensor", "‖ΔW‖"], [*rows[:_SHOWN], *more])
        yield Section("What the adapter does not touch", text, table=table)
