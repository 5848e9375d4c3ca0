"""How alike every two of many adapters are: the cosine of their sketches, exact numbers for the near ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

from loratools.linalg.sketch import SIZE, standard_error
from loratools.options import Options
from loratools.parallel import Progress, no_progress, one_torch_thread
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.find.alike import NEIGHBOURS, Exact, cosines, near, nearest
from loratools.surgery.find.collected import Failed, collect

EVERY = 2000
"""Adapters of which every pair is listed, unless fewer are asked for: two million numbers, 0.2 GB."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The cosine ⟨ΔWᵢ, ΔWⱼ⟩/(‖ΔWᵢ‖·‖ΔWⱼ‖) of every two adapters below a folder, for n adapters n × n.

    `cosines[i][j]` is of `adapters[i]` and `adapters[j]`. That of the pairs in `exact` is computed from the factors in
    float64; every other is that of two sketches of `sketch_size` numbers, whose standard error is (1 − c²)/√sketch_size
    (`standard_error` where c = 0), more where a single direction is most of a change. Where only the `most` others that
    are most alike were looked for of each adapter, `cosines` is empty, and `listed` has these pairs and those in
    `exact`: (i, j, cosine), the most alike first. Else `most` is None, and `listed` empty. `norms` are ‖ΔW‖, by
    sketches. `by_parameters` are adapters of which the base decides what they do, with the reason; they have no cosine
    here.
    """

    folder: str
    adapters: tuple[str, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    most: int | None
    listed: tuple[tuple[int, int, float], ...]
    exact: tuple[tuple[int, int], ...]
    by_parameters: dict[str, str]
    failed: tuple[Failed, ...]
    others: int
    unselected: int
    similar: float
    sketch_size: int
    standard_error: float

    def error(self, first: int, second: int) -> float:
        """Return the standard error of a cosine; 0 where it is exact.

        Raises `KeyError` for a pair that is not listed.
        """
        pair = min(first, second), max(first, second)
        if first == second or pair in set(self.exact):
            return 0.0
        if self.most is None:
            return standard_error(self.cosines[first][second])
        return standard_error({(i, j): value for i, j, value in self.listed}[pair])

    def rows(self, most: int | None = None) -> list[dict[str, Any]]:
        """Return a plain dict for each pair, the most alike first; for the first `most` of them. Default: all."""
        exact = set(self.exact)
        every = sum(1 for _ in self._each()) if most is None else most
        return [
            {"first": self.adapters[i], "second": self.adapters[j], "cosine": value, "exact": (i, j) in exact}
            for i, j, value in nsmallest(every, self._each(), key=lambda pair: -pair[2])
        ]

    def _each(self) -> Iterator[tuple[int, int, float]]:
        yield from self.listed
        for i, row in enumerate(self.cosines):
            yield from ((i, j, row[j]) for j in range(i + 1, len(row)))


@session()
def compare_all(
    folder: str | Path, *, base: Location | Checkpoint | None = None, similar: float = 0.9,
    most: int | None = None, progress: Progress | None = None,
) -> Pairs:  # fmt: skip
    """Tell how alike every two of the adapters below a folder are.

    cos = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖), modules matched by name in one naming for all dialects. Each adapter is read once
    for its sketch (tensor sketch, Pham and Pagh 2013); then every two cost 256 multiplications. Time grows with the
    number of adapters, beyond ten thousand with its square; memory with the number of cosines that are listed.

    Args:
        folder: The folder; what is below it is found in any dialect, as folders and as single files.
        base: Only the adapters of this base model, as `find` takes it. Default: all.
        similar: The cosine, more than 0 and at most 1, from which pairs are computed exactly: of each adapter the 8
            whose sketches are nearest. Default: 0.9.
        most: How many others are listed of each adapter, those that are most alike, at least 1. Default:
            all of up to 2,000 adapters, of more the 8 nearest of each.
        progress: Called with the bytes of factors read since the last call. Default: nobody is told.

    Raises:
        BadFile: There is no such folder.
        InvalidOption: An option cannot be.

    Example:
        >>> pairs = compare_all(".")
        >>> pairs.adapters, round(pairs.cosines[0][3], 6)
        (('adapter', 'blend', 'other', 'sealed'), 1.0)
    """
    options = Options().real("similar", similar, lambda value: 0 < value <= 1, "a number above 0, and at most 1")
    options.number("most", most, least=1, optional=True).done()
    below = collect(folder, base, progress or no_progress)
    chosen = [i for i, each in enumerate(below.adapters) if each.by_change]
    most = most or (NEIGHBOURS if len(chosen) > EVERY else None)
    place = {i: number for number, i in enumerate(chosen)}
    exact = Exact(below.places)
    table: list[list[float]] = []
    some: dict[tuple[int, int], float] = {}
    with one_torch_thread():
        if most is None:
            table, norms = cosines(below.sketches, chosen)
        else:
            some, norms = nearest(below.sketches, chosen, most)
        measured, _ = near(below.sketches, chosen, exact, similar)
    for pair in measured:
        i, j = place[pair.first], place[pair.second]
        if most is None:
            table[i][j] = table[j][i] = pair.cosine
        else:
            some[i, j] = pair.cosine
    names = [each.found.path for each in below.adapters]
    return Pairs(
        str(folder), tuple(names[i] for i in chosen), tuple(norms), tuple(map(tuple, table)), most,
        tuple(sorted(((i, j, value) for (i, j), value in some.items()), key=lambda pair: (-pair[2], pair[:2]))),
        tuple(sorted((place[pair.first], place[pair.second]) for pair in measured)),
        {each.found.path: each.found.by_parameters for each in below.adapters if not each.by_change},
        below.failed, below.others, below.unselected, similar, SIZE, standard_error(0.0),
    )  # fmt: skip
