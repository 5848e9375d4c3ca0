"""What the heads of pages say of an adapter: facts that its headers state."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.format.manifest import public
from loratools.reports.charts.bars import Bars
from loratools.reports.numbers import number, plural, size, whole
from loratools.reports.page import Figure, Section, Table
from loratools.surgery.inspect import AdapterSummary, describe_adapter


def summary_of(adapter: Adapter, name: str) -> AdapterSummary:
    """Return what `inspect` says of an open adapter."""
    return describe_adapter(adapter, name, adapter.dialect)


def facts(summary: AdapterSummary) -> Iterator[tuple[str, str]]:
    """Yield the facts of an adapter."""
    ranks = sorted({group.rank for group in summary.groups} - {0})
    yield "modules", whole(len(summary.modules))
    yield "rank", spread([float(rank) for rank in ranks]) if ranks else "none"
    yield "alpha", spread(sorted({group.alpha for group in summary.groups})) or "none"
    yield "scaling", spread(sorted({group.scaling for group in summary.groups})) or "none"
    yield "parameters", whole(summary.total.parameters)
    yield "size", f"{size(summary.total.nbytes)}, {', '.join(summary.dtypes)}"
    yield "kind", ", ".join(sorted({group.kind for group in summary.groups})) or "tensors trained whole"
    yield "layout", summary.dialect
    if summary.replacements:
        yield "trained whole", plural(len(summary.replacements), "tensor")
    yield from trained(summary)
    yield "base model", base_of(summary.base)
    yield "made by", made_by(summary.provenance)
    if summary.digest:
        yield "digest", summary.digest


def trained(summary: AdapterSummary) -> Iterator[tuple[str, str]]:
    """Yield what the metadata of the files say of its training and its use; nothing of what they are silent about."""
    said = summary.facts
    counts = (("steps", said.steps), ("epochs", said.epochs), ("pictures", said.images))
    words = (
        ("title", said.title), ("trigger words", ", ".join(said.trigger)), ("family", said.family),
        ("resolution", said.resolution), ("learning rate", said.learning_rate), ("date", said.date),
        ("trained with", said.trained_with and public(said.trained_with)),
    )  # fmt: skip
    yield from ((name, text[:_LONGEST]) for name, text in words if text)
    yield from ((name, whole(count)) for name, count in counts if count is not None)


def tags(summary: AdapterSummary) -> Iterator[Section]:
    """Yield the section of the tags that an image adapter was trained on, where its file has them."""
    frequent = [(tag[:_LONGEST], float(count)) for tag, count in summary.facts.frequent_tags[:_TAGS]]
    if frequent:
        bars = Bars("Bars: how often each tag is in the captions", frequent, show=lambda count: whole(round(count)))
        text = f"The most frequent of {plural(summary.facts.tags_in_all, 'tag')} in its captions."
        table = Table(["tag", "captions"], [[tag, whole(round(count))] for tag, count in frequent])
        reading = "What is in nearly every caption is what the adapter has tied itself to; try it as a trigger."
        yield Section("What it was trained on", text, [Figure("Most frequent tags", bars.draw(), reading, table)])


def spread(values: list[float]) -> str:
    """Return a number, or the least and the greatest of several."""
    shown = list(dict.fromkeys(map(number, values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}" if shown else ""


def base_of(base: BaseIdentity | None) -> str:
    """Return the name of a base model, and whether its hash is known: no path of a machine."""
    sealed = "sealed with its hash" if base and base.sealed else "no hash, so a wrong one cannot be told"
    return f"{base_name(base)}, {sealed}"


def base_name(base: BaseIdentity | None) -> str:
    """Return the name of a base model alone."""
    return public(base.id) if base and base.id else "not named"


def made_by(steps: tuple[Step, ...]) -> str:
    """Return the operations that made something, oldest first."""
    return ", then ".join(f"{step.operation} ({step.tool})" for step in steps) or "not stated"


def targets(summary: AdapterSummary) -> Section:
    """Return the section of which modules have which rank."""
    rows = [
        (target, group.kind, whole(group.rank) if group.rank else "none", number(group.alpha), number(group.scaling))
        for group in summary.groups
        for target in group.targets
    ]
    more = [("and more", "", "", "", "")] if len(rows) > _MOST else []
    text = "Numbers of layers are collapsed: [0-29] stands for thirty layers, {q,v} for two projections."
    return Section(
        "Which modules it changes", text,
        table=Table(("modules", "kind", "rank", "alpha", "scaling"), [*rows[:_MOST], *more], 2),
    )  # fmt: skip


_MOST, _TAGS, _LONGEST = 40, 16, 200
