"""The page of a folder of adapters: who resembles whom, which are the same, and what each is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from loratools.format.manifest import public
from loratools.parallel import one_torch_thread
from loratools.reports.markup import element, joined
from loratools.reports.numbers import number, plural, size, whole
from loratools.reports.page import Page, Section, Table
from loratools.reports.pages._matrix import Cosines, matrix
from loratools.reports.pages._pair import signed
from loratools.reports.subjects import Subjects
from loratools.surgery.find import Findings, FoundAdapter, find
from loratools.surgery.find.alike import Exact

NEEDS = "a folder with several adapters below it"
_COMPARED = 30
"""Adapters whose every two are measured; of more, those with a near one come first."""
_ROWS = 60


def fits(subjects: Subjects) -> bool:
    """Tell whether this is a folder of adapters."""
    return len(subjects.folders) == 1 and not subjects.adapters and not subjects.models


def page(subjects: Subjects) -> Page:
    """Make the page."""
    (folder,) = subjects.folders
    base = subjects.base.model if subjects.base else None
    found = find(folder.path, base=base)
    chosen = _chosen(found)
    cosines = _cosines(folder.path, [each.path for each in chosen])
    twice = sum(len(group.paths) - 1 for group in found.duplicates)
    lead = (
        f"{plural(len(found.adapters), 'adapter')} in {size(sum(each.nbytes for each in found.adapters))}: "
        f"{plural(len(found.near), 'pair')} nearly the same, {whole(twice)} the same as another."
    )
    facts = [
        ("adapters", whole(len(found.adapters))),
        ("size", size(sum(each.nbytes for each in found.adapters))),
        ("groups of duplicates", whole(len(found.duplicates))),
        ("nearly the same", plural(len(found.near), "pair")),
        ("not readable", whole(len(found.failed))),
        ("other models and files", whole(found.others)),
        *([("only of the base", subjects.base.name)] if subjects.base else []),
    ]
    sections = [*_resemblance(chosen, cosines, found), *_same(found), *_near(found), _listed(found), *_failed(found)]
    return Page("Folder of LoRA adapters", folder.name, lead, facts, sections)


def _chosen(found: Findings) -> list[FoundAdapter]:
    """Return the adapters whose every two are measured: one of each group of duplicates, those with near ones first."""
    copies = {path for group in found.duplicates for path in group.paths[1:]}
    near = {path for pair in found.near for path in (pair.first, pair.second)}
    single = [each for each in found.adapters if each.path not in copies and not each.by_parameters]
    kept = {each.path for each in sorted(single, key=lambda each: each.path not in near)[:_COMPARED]}
    return [each for each in single if each.path in kept]


def _cosines(folder: Path, paths: Sequence[str]) -> Cosines:
    """Return the exact cosine of every two whose changes are not zero."""
    exact = Exact([folder / path for path in paths])
    with one_torch_thread():
        norms = [math.sqrt(exact.norm2(i)) for i in range(len(paths))]
        return {
            (i, j): max(-1.0, min(1.0, exact.inner(i, j) / (norms[i] * norms[j])))
            for i, j in combinations(range(len(paths)), 2)
            if norms[i] and norms[j]
        }


def _resemblance(chosen: Sequence[FoundAdapter], cosines: Cosines, found: Findings) -> Iterator[Section]:
    if len(chosen) < 2:
        return
    left = len(found.adapters) - len(chosen)
    text = (
        "The cosine of two whole adapters: 1 where both change the model the same way, 0 where they have nothing in "
        "common." + (f" Not in the picture: {_why_left(found, chosen)}." if left else "")
    )  # fmt: skip
    yield Section("Who resembles whom", text, [matrix([each.path for each in chosen], cosines)])


def _why_left(found: Findings, chosen: Sequence[FoundAdapter]) -> str:
    """Return why adapters are not in the picture, as far as any are for that."""
    copies = sum(len(group.paths) - 1 for group in found.duplicates if not group.by_parameters)
    apart = sum(bool(each.by_parameters) for each in found.adapters)
    beyond = len(found.adapters) - len(chosen) - copies - apart
    return ", ".join(
        [
            *([plural(copies, "duplicate")] if copies else []),
            *([f"{whole(apart)} without a cosine, as find says why"] if apart else []),
            *([f"{whole(beyond)} beyond {_COMPARED}"] if beyond else []),
        ]
    )


def _same(found: Findings) -> Iterator[Section]:
    rows = [
        [group.paths[0], path, "parameters" if group.by_parameters else "ΔW", number(distance)]
        for group in found.duplicates
        for path, distance in zip(group.paths[1:], group.distances[1:], strict=True)
    ]
    if rows:
        text = "Adapters that do the same, in whatever dialect, dtype or factors: one of them is enough."
        table = Table(["adapter", "is the same as", "by", "distance"], _few(rows), 2)
        yield Section("Which are the same", text, table=table)


def _near(found: Findings) -> Iterator[Section]:
    rows = [[pair.first, pair.second, signed(pair.cosine), number(pair.ratio)] for pair in found.near]
    if rows:
        more = f" {plural(found.unlisted, 'further pair')} may be as near." if found.unlisted else ""
        text = f"Pairs with a cosine of at least {number(found.similar)}. The ratio is that of their ‖ΔW‖.{more}"
        table = Table(["first", "second", "cosine", "ratio"], _few(rows), 2)
        yield Section("Which are nearly the same", text, table=table)


def _listed(found: Findings) -> Section:
    rows = [
        [each.path, public(each.base) if each.base else "not named", ", ".join(each.kinds) or "whole tensors",
         _ranks(each.ranks), whole(each.modules), size(each.nbytes)]
        for each in sorted(found.adapters, key=lambda each: each.path)
    ]  # fmt: skip
    headings = ["adapter", "base model", "kind", "rank", "modules", "size"]
    return Section("What each is", "All adapters of the folder, by name.", table=Table(headings, _few(rows), 3))


def _failed(found: Findings) -> Iterator[Section]:
    if found.failed:
        why = joined("These look like adapters and cannot be read: ", element("code", "loratools inspect"), " tells.")
        table = Table(["file"], _few([[each.path] for each in found.failed]))
        yield Section("What could not be read", why, table=table)


def _ranks(ranks: tuple[int, int]) -> str:
    least, most = ranks
    return "none" if not most else str(most) if least == most else f"{least} to {most}"


def _few(rows: list[list[str]]) -> list[list[str]]:
    more = [[f"and {len(rows) - _ROWS} more", *[""] * (len(rows[0]) - 1)]] if len(rows) > _ROWS else []
    return [*rows[:_ROWS], *more]
