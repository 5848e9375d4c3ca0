"""Find the adapters below a folder: what each is, which are the same, and which nearly.

collected  all adapters below a folder, each with its sketch
sketches   what one adapter is, and the sketch of what it changes
selection  whether it is one of the base model that was asked for
alike      which of many are the same or nearly: by sketches, then by exact numbers
pairs      the cosine of every two
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratools.linalg.sketch import SIZE, standard_error
from loratools.options import Options
from loratools.parallel import Progress, no_progress, one_torch_thread
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.find.alike import Exact, near, same
from loratools.surgery.find.collected import Failed, collect
from loratools.surgery.find.pairs import Pairs, compare_all
from loratools.surgery.find.sketches import FoundAdapter, Sketched

__all__ = ["Duplicates", "Failed", "Findings", "FoundAdapter", "NearPair", "Pairs", "compare_all", "find"]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Adapters that do the same: ΔW is one but for rounding, or the parameters are, where `by_parameters`.

    `distances` are ‖ΔW − ΔW₁‖/‖ΔW₁‖ of each to the first of them, `norm` is ‖ΔW₁‖; None by parameters.
    """

    paths: tuple[str, ...]
    distances: tuple[float, ...]
    by_parameters: bool
    norm: float | None


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two adapters whose changes point nearly the same way: the exact cosine, and `ratio` = ‖ΔW₂‖/‖ΔW₁‖."""

    first: str
    second: str
    cosine: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Findings:
    """The adapters below a folder.

    `others` counts models and files that are no adapters, `unselected` adapters of another base than the one that was
    asked for. Near pairs have at least the cosine `similar`; each is measured exactly, and stands for its duplicates.
    `unlisted` counts pairs whose sketches are as near and which were not measured, for each adapter is measured
    against the 8 nearest. A sketch has `sketch_size` numbers, and the cosine of two of them errs by `standard_error`
    where the cosine is `similar`; pairs up to 6 of these below it are measured.
    """

    folder: str
    adapters: tuple[FoundAdapter, ...]
    duplicates: tuple[Duplicates, ...]
    near: tuple[NearPair, ...]
    failed: tuple[Failed, ...]
    others: int
    unselected: int
    unlisted: int
    similar: float
    sketch_size: int
    standard_error: float

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain dict for each adapter, with the number of its group of duplicates, from 1, or None."""
        group = {path: number for number, each in enumerate(self.duplicates, 1) for path in each.paths}
        return [asdict(adapter) | {"group": group.get(adapter.path)} for adapter in self.adapters]


@session()
def find(
    folder: str | Path, *, base: Location | Checkpoint | None = None, similar: float = 0.9,
    progress: Progress | None = None,
) -> Findings:  # fmt: skip
    """Find the adapters below a folder: what each is, which are the same, and which nearly.

    Two adapters are the same when their ΔW = s·B·A are, but for rounding: in another dialect, sealed or not, in another
    dtype, with the scaling folded in, or with factors in another basis. ΔW is never multiplied out: a sketch of 256
    numbers of each (`linalg/sketch.py`) names pairs, whose cosine ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) is then computed exactly, in
    float64. An adapter of which the base decides what it does (DoRA, OFT, (IA)³, tensors trained whole) is compared by
    its parameters, and only with those that have the same; `by_parameters` says why.

    Args:
        folder: The folder; what is below it is found in any dialect, as folders and as single files.
        base: Only the adapters of this base model. Its name on the Hub, or the last part of it: those that state it,
            and those whose hash of the base is that of one which states it.
            The model itself (a path, an `hf://` reference, an open `Checkpoint`): those that were sealed with it, and
            of the unsealed those whose modules it has. Default: all.
        similar: The cosine from which two adapters are listed as near, more than 0 and at most 1. Default: 0.9.
        progress: Called with the bytes of factors read since the last call. Default: nobody is told.

    Returns:
        Every adapter, groups of duplicates, near pairs, and what could not be read.

    Raises:
        BadFile: There is no such folder.
        InvalidOption: An option cannot be.

    Example:
        >>> found = find(".")
        >>> [adapter.path for adapter in found.adapters], found.duplicates[0].paths
        (['adapter', 'blend', 'other', 'sealed'], ('adapter', 'sealed'))
    """
    options = Options().real("similar", similar, lambda value: 0 < value <= 1, "a number above 0, and at most 1")
    options.done()
    below = collect(folder, base, progress or no_progress)
    adapters = below.adapters
    exact = Exact(below.places)
    with one_torch_thread():
        first = same(adapters, below.sketches, exact)
        heads = [i for i, (head, _) in enumerate(first) if head == i and adapters[i].by_change]
        pairs, unlisted = near(below.sketches, heads, exact, similar)
    names = [each.found.path for each in adapters]
    return Findings(
        str(folder), tuple(each.found for each in adapters), tuple(_groups(adapters, first, exact)),
        tuple(NearPair(names[pair.first], names[pair.second], pair.cosine, pair.ratio) for pair in pairs),
        below.failed, below.others, below.unselected, unlisted, similar, SIZE, standard_error(similar),
    )  # fmt: skip


def _groups(adapters: list[Sketched], first: list[tuple[int, float]], exact: Exact) -> Iterator[Duplicates]:
    members: dict[int, list[tuple[int, float]]] = {}
    for i, (head, distance) in enumerate(first):
        members.setdefault(head, []).append((i, distance))
    for head, group in members.items():
        if len(group) > 1:
            paths, distances = zip(*((adapters[i].found.path, off) for i, off in group), strict=True)
            norm = math.sqrt(exact.norm2(head)) if adapters[head].by_change else None
            yield Duplicates(paths, distances, norm is None, norm)
