"""The page of two or more adapters: cosines, shared directions beside chance, and what each amplifies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from loratools.reports.numbers import number, plural, whole
from loratools.reports.page import Page, Section, Table
from loratools.reports.pages import _facts, _pair
from loratools.reports.pages._amplified import projections, table_7
from loratools.reports.pages._matrix import matrix
from loratools.reports.subjects import Named, Subjects
from loratools.surgery.compare import Comparison, compare

NEEDS = "two or more adapters; with their base model also Table 7 of the LoRA paper"
_ALL = 3  # adapters of which every two are shown in full; of more, each beside the first
_MOST = 4  # pairs in full


def fits(subjects: Subjects) -> bool:
    """Tell whether these are several adapters."""
    return len(subjects.adapters) > 1 and not subjects.models and not subjects.folders


def page(subjects: Subjects) -> Page:
    """Make the page."""
    adapters, base = subjects.adapters, subjects.base.model if subjects.base else None
    pairs = list(combinations(range(len(adapters)), 2))
    full = [pair for pair in pairs if len(adapters) <= _ALL or pair[0] == 0][:_MOST]
    found = {
        (i, j): compare(
            adapters[i].adapter, adapters[j].adapter, base, paper=(i, j) in full, seed=subjects.seed
        )
        for i, j in pairs
    }  # fmt: skip
    if len(adapters) == 2:
        return _of_two(subjects, found[0, 1])
    names = [each.name for each in adapters]
    sections = [_whole(names, found), _each(adapters, found)]
    for i, j in full:
        several = len(full) > 1
        sections += _pair.sections((names[i], names[j]), found[i, j], 1, f"{names[i]} and {names[j]}: " * several)
    sections += _amplified(names, [next((found[pair], pair.index(i)) for pair in full if i in pair) for i in range(
        1 + max(j for _, j in full))])  # fmt: skip
    closest = max(pairs, key=lambda pair: found[pair].cosine)
    lead = (
        f"The most alike are {names[closest[0]]} and {names[closest[1]]}, with a cosine of "
        f"{_pair.signed(found[closest].cosine)}."
    )
    facts = [("adapters", ", ".join(names)), *_shared_facts(subjects)]
    return Page("Comparison of LoRA adapters", f"{len(adapters)} adapters", lead, facts, sections)


def _of_two(subjects: Subjects, found: Comparison) -> Page:
    first, second = (each.name for each in subjects.adapters)
    both = plural(len(found.modules), "module")
    lead = (
        f"The cosine of their changes is {_pair.signed(found.cosine)}, over {both} that "
        f"both change. {_pair.overlap(found)}"
    )
    ranks = [_facts.spread(sorted({float(module.ranks[side]) for module in found.modules})) for side in (0, 1)]
    facts = [
        ("cosine", _pair.signed(found.cosine)),
        ("‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖", number(found.distance)),
        ("‖ΔW‖", f"{number(found.norms[0])} and {number(found.norms[1])}"),
        ("rank", " and ".join(ranks)),
        ("shared modules", whole(len(found.modules))),
        ("only in one", f"{len(found.only[0])} and {len(found.only[1])}"),
        *_shared_facts(subjects),
    ]
    sections = [
        *_pair.sections((first, second), found, 2), *_amplified([first, second], [(found, 0), (found, 1)]),
        *_pair.alone((first, second), found), *_unmeasured((first, second), found),
    ]  # fmt: skip
    return Page("Comparison of two LoRA adapters", f"{first} and {second}", lead, facts, sections)


def _amplified(names: list[str], sides: list[tuple[Comparison, int]]) -> Iterator[Section]:
    rows = [projections(found, side) for found, side in sides]
    if any(rows):
        yield table_7(names[: len(rows)], rows)


def _shared_facts(subjects: Subjects) -> Iterator[tuple[str, str]]:
    if subjects.base:
        yield "measured on", subjects.base.name
    yield "seed of the control", whole(subjects.seed)


def _whole(names: list[str], found: dict[tuple[int, int], Comparison]) -> Section:
    text = "The cosine of two whole adapters counts every module of each: what only one of them changes lowers it."
    return Section("Who resembles whom", text, [matrix(names, {pair: each.cosine for pair, each in found.items()})])


def _each(adapters: tuple[Named, ...], found: dict[tuple[int, int], Comparison]) -> Section:
    rows = []
    for i, each in enumerate(adapters):
        pair = next(pair for pair in found if i in pair)
        summary = _facts.summary_of(each.adapter, each.name)
        ranks = _facts.spread(sorted({float(group.rank) for group in summary.groups}))
        norm = number(found[pair].norms[pair.index(i)])
        rows.append([each.name, _facts.base_name(summary.base), whole(len(summary.modules)), ranks, norm])
    table = Table(["adapter", "base model", "modules", "rank", "‖ΔW‖"], rows, 2)
    return Section("The adapters", "What each is, in the order in which they were given.", table=table)


def _unmeasured(names: tuple[str, str], found: Comparison) -> Iterator[Section]:
    rows = [
        [name, module, reason]
        for name, in_part, left_out in zip(names, found.in_part, found.left_out, strict=True)
        for module, reason in {**left_out, **in_part}.items()
    ]
    if rows:
        more = [[f"and {len(rows) - 12} more", "", ""]] if len(rows) > 12 else []
        text = "What these do depends on the weight under them, which --base gives; none or only a part was measured."
        table = Table(["adapter", "module", "why"], [*rows[:12], *more], 3)
        yield Section("What was not measured", text, table=table)
