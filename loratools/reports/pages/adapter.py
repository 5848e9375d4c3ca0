"""The page of one adapter: what it is, where it changes the model, and how much of its rank it uses."""

from __future__ import annotations

from loratools.reports.numbers import plural, size, whole
from loratools.reports.page import Page
from loratools.reports.pages import _facts, _strength
from loratools.reports.pages._extracted import is_extraction
from loratools.reports.subjects import Subjects
from loratools.surgery.spectrum import spectrum

NEEDS = "one adapter; with its base model also ‖ΔW‖/‖W‖"


def fits(subjects: Subjects) -> bool:
    """Tell whether this is one adapter alone."""
    return len(subjects.adapters) == 1 and not (subjects.models or subjects.folders or is_extraction(subjects))


def page(subjects: Subjects) -> Page:
    """Make the page."""
    (subject,) = subjects.adapters
    base = subjects.base.model if subjects.base else None
    summary = _facts.summary_of(subject.adapter, subject.name)
    measured = spectrum(subject.adapter, base=base, relative=base is not None)
    what = f"{whole(summary.total.parameters)} parameters in {size(summary.total.nbytes)}"
    lead = f"{plural(len(summary.modules), 'module')}, {what}. {_strength.lead(measured)}"
    beside = [("measured on", subjects.base.name)] if subjects.base else []
    return Page(
        "LoRA adapter", subject.name, lead, [*_facts.facts(summary), *beside],
        [*_strength.sections(measured), _facts.targets(summary), *_facts.tags(summary)],
    )  # fmt: skip
