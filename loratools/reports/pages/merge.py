"""The page of a merged model beside its base: what changed, and how much of each adapter survived the rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratools.format import record
from loratools.format.digest import checked_digest
from loratools.format.manifest import public
from loratools.reports.charts.bars import Bars
from loratools.reports.markup import element, joined
from loratools.reports.numbers import number, percent, plural, size, whole
from loratools.reports.page import Figure, Page, Section, Table
from loratools.reports.pages._extracted import is_extraction
from loratools.reports.pages._maps import layer_map, middle
from loratools.reports.scale import Scale
from loratools.reports.subjects import Named, Subjects
from loratools.surgery.extract.changes import ModelChanges, TensorChange, changes
from loratools.surgery.inspect import describe_checkpoint
from loratools.surgery.verify import Verification, verify
from loratools.surgery.verify.probes import PROBES

NEEDS = "one model and --base; with the adapters that are merged in it also what survived of each"
_SHOWN = 24


def fits(subjects: Subjects) -> bool:
    """Tell whether this is a model with its base, and perhaps its adapters."""
    return len(subjects.models) == 1 and subjects.base is not None and not is_extraction(subjects)


def page(subjects: Subjects) -> Page:
    """Make the page."""
    ((subject,), base) = subjects.models, subjects.base
    assert base is not None
    stated = record.read(subject.model)
    found = changes(subject.model, base.model)
    checked = _verified(subjects, stated) if subjects.adapters else None
    summary = describe_checkpoint(subject.model, subject.name)
    entries = record.held(stated)
    facts = [
        ("base model", base.name),
        ("changed tensors", f"{len(found.changed)} of {len(found.tensors)}"),
        ("size", f"{size(summary.total.nbytes)}, {', '.join(summary.dtypes)}"),
        ("change ‖W′ − W‖", number(found.norm)),
        *_recorded(stated, entries),
        *_weighed(subjects, stated),
    ]
    sections = [*_accounts(subjects, checked, found), *_changed(found), *_survived(checked), *_whole(found)]
    return Page(
        "Merged model" if entries or checked else "Model beside its base", subject.name, _lead(found, checked, stated),
        facts, [*sections, *_held(entries)],
    )  # fmt: skip


def _verified(subjects: Subjects, stated: Mapping[str, Any]) -> Verification:
    assert subjects.base is not None
    adapters = [each.adapter for each in subjects.adapters]
    return verify(
        subjects.models[0].model, subjects.base.model, adapters, weights=_weights(subjects.adapters, stated),
        seed=subjects.seed, progress=subjects.progress,
    )  # fmt: skip


def _weights(adapters: Sequence[Named], stated: Mapping[str, Any]) -> list[float | str]:
    """Return the weights at which the record has these adapters, 1 where it has none of that digest."""
    entries = record.held(stated) if record.is_complete(stated) else []
    by_digest = {entry["digest"]: entry for entry in entries}
    own = [by_digest.get(checked_digest(each.adapter, each.name), {}) for each in adapters]
    return [entry.get(record.WORDS) or entry.get("weight", 1.0) for entry in own]


def _weighed(subjects: Subjects, stated: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for each, weight in zip(subjects.adapters, _weights(subjects.adapters, stated), strict=True):
        shown = weight if isinstance(weight, str) else number(weight)
        yield f"weight of {each.name}", shown if record.held(stated) else f"{shown}, for no record says another"


def _lead(found: ModelChanges, checked: Verification | None, stated: Mapping[str, Any]) -> str:
    moved = f"{len(found.changed)} of {plural(len(found.tensors), 'tensor')} differ from the base"
    if checked is None:
        kept = stated.get("retention")
        said = f"; {percent(kept)} of the change survived rounding" if isinstance(kept, float) else ""
        more = " Give its adapters too to see what survived of each module." if record.held(stated) else ""
        return f"{moved}{said}.{more}"
    applied = [check.applied for check in checked.checked]
    verdict = "it is base + adapter, within rounding" if checked.tensors_ok else "it is NOT base + these adapters"
    spread = (
        f"; of each module's change {_hundredths(min(applied))} to {_hundredths(max(applied))} is there"
        if applied
        else ""
    )
    return f"{moved}; {verdict}{spread}."


def _accounts(subjects: Subjects, checked: Verification | None, found: ModelChanges) -> Iterator[Section]:
    """Yield the account of every tensor."""
    counts = [
        ("changed", len(found.changed)), ("as in the base", len(found.tensors) - len(found.changed)),
        ("new, or of another shape", len(found.new)), ("missing", len(found.missing)),
    ]  # fmt: skip
    counts = [(name, count) for name, count in counts if count]
    bars = Bars("Bars: how many tensors changed", counts, show=lambda count: whole(round(count)))
    figures = [
        Figure("Tensors", bars.draw(), "Every tensor of the model, beside the base's tensor of its name.",
               Table(["tensors", "count"], [[name, whole(count)] for name, count in counts]))
    ]  # fmt: skip
    text: str = "What a merge may change are the weights that its adapters are for; all others must be the base's."
    table = None
    if checked is not None:
        good = sum(check.within for check in checked.checked)
        text = joined(
            f"{good} of {plural(len(checked.checked), 'changed tensor')} are base + adapter within rounding, "
            f"{checked.identical} others are the base's byte for byte: what ",
            element("code", "loratools verify"),
            f" finds on {PROBES} random probes of seed {checked.seed}.",
        )
        beyond = [check for check in checked.checked if not check.within]
        wrong = [[check.name, f"error {number(check.error)} of its change"] for check in beyond]
        wrong += [[name, "differs, and no adapter changes it"] for name in checked.differing]
        wrong += [[name, "missing"] for name in checked.missing] + [[name, "not in the base"] for name in checked.extra]
        more = [[f"and {len(wrong) - _SHOWN} more", ""]] if len(wrong) > _SHOWN else []
        table = Table(["tensor", "what is wrong"], [*wrong[:_SHOWN], *more], 2) if wrong else None
    yield Section("Whether it is what it should be", text, figures, table)


def _changed(found: ModelChanges) -> Iterator[Section]:
    moved = {_module(tensor): tensor for tensor in found.changed if math.isfinite(tensor.relative)}
    if not moved:
        return

    def norm(names: Sequence[str]) -> float:
        return math.sqrt(math.fsum(moved[name].norm ** 2 for name in names))

    def relative(names: Sequence[str]) -> float:
        return norm(names) / math.sqrt(math.fsum(moved[name].base_norm ** 2 for name in names))

    figures = [
        layer_map(
            "Strength of the change, ‖W′ − W‖", "‖W′ − W‖",
            "The stronger its colour, the further that weight has moved.",
            list(moved), norm,
        ),
        layer_map(
            "Beside the weight, ‖W′ − W‖ / ‖W‖", "‖W′ − W‖/‖W‖",
            "A cell of 1 % has moved by a hundredth of its own length.", list(moved), relative, show=percent,
        ),
    ]  # fmt: skip
    yield Section("What changed", "Measured on the numbers as both models store them, rounding included.", figures)


def _survived(checked: Verification | None) -> Iterator[Section]:
    """Yield how much of the adapters' change each weight holds."""
    if checked is None or not checked.checked:
        return
    applied = {check.name.removesuffix(".weight"): check.applied for check in checked.checked}
    errors = {check.name.removesuffix(".weight"): check.error for check in checked.checked}
    figures = [
        layer_map(
            "Retention, ⟨W′ − W, ΔW⟩ / ‖ΔW‖²", "retention",
            "100 % is the whole change, applied once; less was rounded away. Estimated on random probes.",
            list(applied), middle(applied), show=_hundredths, scale=Scale(0.0, max(1.0, _most(applied.values()))),
        ),
        layer_map(
            "What the adapter does not explain", "error",
            "The part of W′ − W that is no ΔW: rounding to the model's dtype, or another change.",
            list(errors), middle(errors), show=percent,
        ),
    ]  # fmt: skip
    text = "Rounding to a short dtype loses small changes of large weights."
    yield Section("How much of the change survived", text, figures)


def _whole(found: ModelChanges) -> Iterator[Section]:
    """Yield the tensors that are new or missing."""
    rows = [[name, "new, or of another shape"] for name in found.new] + [[name, "missing"] for name in found.missing]
    if rows:
        more = [[f"and {len(rows) - _SHOWN} more", ""]] if len(rows) > _SHOWN else []
        text = "Tensors without a counterpart of their shape on the other side."
        yield Section("What has no counterpart", text, table=Table(["tensor", ""], [*rows[:_SHOWN], *more], 2))


def _held(entries: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Yield what the record says of the adapters in the model."""
    if entries:
        columns = ("digest", "weight", "modules", "kinds", "ranks", "dialect")
        rows = [[str(entry.get(column, "")) for column in columns] for entry in entries]
        text = "What loratools.json beside the model says of the adapters that it holds."
        yield Section("What its record says", text, table=Table(columns, rows))


def _recorded(stated: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    yield "made by", f"{stated.get('operation')} ({stated.get('tool')})" if stated else "not stated"
    if entries:
        yield "adapters", whole(len(entries))
    kept, base = stated.get("retention"), stated.get("base")
    if isinstance(kept, float):
        yield "retention, by its record", percent(kept)
    if isinstance(base, Mapping) and isinstance(name := base.get("id"), str):
        yield "base, by its record", public(name)


def _hundredths(share: float) -> str:
    """Return a retention, which probes tell to a hundredth of a percent or so."""
    return f"{share * 100:.2f} %"


def _most(shares: Iterable[float]) -> float:
    """Return the largest of some retentions, 1 where it is hardly more: an estimate scatters."""
    most = max(shares)
    return most if most > 1.05 else 1.0


def _module(tensor: TensorChange) -> str:
    return tensor.path.removesuffix(".weight")
