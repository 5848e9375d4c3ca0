"""How alike every two of many adapters are: the cosine of their sketches, exact numbers for the near ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.linalg.sketch import SIZE, standard_error
from loratools.options import Options
from loratools.parallel import Progress, no_progress, one_torch_thread
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.find.alike import Exact, cosines, near
from loratools.surgery.find.collected import Failed, collect


@dataclass(frozen=True, slots=True)
class Pairs:
    """The cosine ⟨ΔWᵢ, ΔWⱼ⟩/(‖ΔWᵢ‖·‖ΔWⱼ‖) of every two adapters below a folder, for n adapters n × n.

    `cosines[i][j]` is of `adapters[i]` and `adapters[j]`. That of the pairs in `exact` is computed from the factors in
    float64; every other is that of two sketches of `sketch_size` numbers, whose standard error is (1 − c²)/√sketch_size
    (`standard_error` where c = 0), more where a single direction is most of a change. `norms` are ‖ΔW‖, by sketches.
    `by_parameters` are adapters of which the base decides what they do, with the reason; they have no cosine here.
    """

    folder: str
    adapters: tuple[str, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    exact: tuple[tuple[int, int], ...]
    by_parameters: dict[str, str]
    failed: tuple[Failed, ...]
    others: int
    unselected: int
    similar: float
    sketch_size: int
    standard_error: float

    def error(self, first: int, second: int) -> float:
        """Return the standard error of a cosine; 0 where it is exact."""
        if first == second or (min(first, second), max(first, second)) in set(self.exact):
            return 0.0
        return standard_error(self.cosines[first][second])

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain dict for each pair, the most alike first."""
        exact = set(self.exact)
        pairs = [
            {"first": self.adapters[i], "second": self.adapters[j], "cosine": row[j], "exact": (i, j) in exact}
            for i, row in enumerate(self.cosines)
            for j in range(i + 1, len(row))
        ]
        return sorted(pairs, key=lambda pair: -pair["cosine"])


@session()
def compare_all(
    folder: str | Path, *, base: Location | Checkpoint | None = None, similar: float = 0.9,
    progress: Progress | None = None,
) -> Pairs:  # fmt: skip
    """Tell how alike every two of the adapters below a folder are.

    cos = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖), modules matched by name in one naming for all dialects. Each adapter is read once
    for its sketch (tensor sketch, Pham and Pagh 2013); then every two cost 256 multiplications.

    Args:
        folder: The folder; what is below it is found in any dialect, as folders and as single files.
        base: Only the adapters of this base model, as `find` takes it. Default: all.
        similar: The cosine, more than 0 and at most 1, from which pairs are computed exactly: of each adapter the 8
            whose sketches are nearest. Default: 0.9.
        progress: Called with the bytes of factors read since the last call. Default: nobody is told.

    Raises:
        BadFile: There is no such folder.
        InvalidOption: An option cannot be.

    Example:
        >>> pairs = compare_all(".")
        >>> pairs.adapters, round(pairs.cosines[0][3], 6)
        (('adapter', 'blend', 'other', 'sealed'), 1.0)
    """
    Options().real("similar", similar, lambda value: 0 < value <= 1, "a number above 0, and at most 1").done()
    below = collect(folder, base, progress or no_progress)
    chosen = [i for i, each in enumerate(below.adapters) if each.sketch is not None]
    place = {i: number for number, i in enumerate(chosen)}
    exact = Exact(below.places)
    with one_torch_thread():
        table, norms = cosines(below.adapters, chosen)
        measured, _ = near(below.adapters, chosen, exact, similar)
    for pair in measured:
        i, j = place[pair.first], place[pair.second]
        table[i][j] = table[j][i] = pair.cosine
    names = [each.found.path for each in below.adapters]
    return Pairs(
        str(folder), tuple(names[i] for i in chosen), tuple(norms), tuple(map(tuple, table)),
        tuple(sorted((place[pair.first], place[pair.second]) for pair in measured)),
        {each.found.path: each.found.by_parameters for each in below.adapters if each.sketch is None},
        below.failed, below.others, below.unselected, similar, SIZE, standard_error(0.0),
    )  # fmt: skip
