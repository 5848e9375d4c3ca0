"""Where an update lands: a rectangle of a base tensor that is seen as a matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import gcd


class NoPlace(Exception):
    """Why a module has no certain place, and what would decide it; becomes a line of the resolver's error."""


@dataclass(frozen=True, slots=True)
class Site:
    """A rectangle of a base tensor, and the part of an update's ΔW that is added there.

    The tensor is seen as a matrix of shape `matrix` (a view of its C-order data: a convolution `[out, in, kh, kw]` as
    `(out, in·kh·kw)`, stacked experts `[E, out, in]` as `(E·out, in)`). The rectangle is `rows` × `columns` of it, each
    `(start, stop, step)`. It holds rows `part` of ΔW (output features), or their transpose where the base stores
    `[in, out]` (`transposed`, as the Conv1D of GPT-2 does).
    """

    tensor: str
    matrix: tuple[int, int]
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    part: tuple[int, int]
    transposed: bool = False

    @classmethod
    def whole(cls, tensor: str, matrix: tuple[int, int], *, transposed: bool = False) -> Site:
        """Cover a whole matrix with all of an update."""
        out = matrix[1] if transposed else matrix[0]
        return cls(tensor, matrix, (0, matrix[0], 1), (0, matrix[1], 1), (0, out), transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        return len(range(*self.rows)), len(range(*self.columns))

    @property
    def part_rows(self) -> slice:
        """Rows of ΔW that land here."""
        return slice(*self.part)

    def overlap(self, start: int, stop: int) -> tuple[slice, slice] | None:
        """Return (rows within the tile, rows within the rectangle) for the tile [`start`, `stop`) of matrix rows.

        None where they do not meet. Both slices have the same length.
        """
        first, last, step = self.rows
        low = max(0, -(-(start - first) // step))
        high = -(-(min(stop, last) - first) // step)
        if low >= high:
            return None
        begin = first + low * step - start
        return slice(begin, begin + (high - low - 1) * step + 1, step), slice(low, high)

    def meets(self, other: Site) -> bool:
        """Tell whether this rectangle shares an element with another of the same tensor."""
        return _meet(self.rows, other.rows) and _meet(self.columns, other.columns)

    def cut(self, others: Iterable[Site]) -> list[Site]:
        """Return the pieces of this site between the ends, along the output features, of `others` that it meets.

        Two sites that are cut by each other have pieces that are equal or do not meet. Rows with a step stay whole.
        """
        start, stop, step = self.outputs
        ends = {end for other in others if self.meets(other) for end in other.outputs[:2] if start < end < stop}
        if step != 1 or not ends:
            return [self]
        points = [start, *sorted(ends), stop]
        return [self._piece(at, to, self.part[0] + at - start) for at, to in pairwise(points)]

    @property
    def outputs(self) -> tuple[int, int, int]:
        """The range of the tensor's rows or columns that are output features."""
        return self.columns if self.transposed else self.rows

    def _piece(self, start: int, stop: int, part: int) -> Site:
        place = (start, stop, 1)
        rows, columns = (self.rows, place) if self.transposed else (place, self.columns)
        return Site(self.tensor, self.matrix, rows, columns, (part, part + stop - start), self.transposed)


def clashes(placed: Iterable[tuple[str, Site]]) -> Iterator[tuple[str, str, str]]:
    """Yield a tensor and each two modules, sorted, that are placed on the same elements of it.

    >>> list(clashes([("q", Site.whole("w", (2, 2))), ("k", Site.whole("v", (2, 2))), ("k", Site.whole("w", (2, 2)))]))
    [('w', 'q', 'k')]
    """
    by_tensor: dict[str, list[tuple[str, Site]]] = defaultdict(list)
    for module, site in placed:
        by_tensor[site.tensor].append((module, site))
    for tensor, together in by_tensor.items():
        pairs = {(a, b) for (a, first), (b, second) in combinations(together, 2) if a != b and first.meets(second)}
        for a, b in sorted(pairs):
            yield tensor, a, b


def _meet(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """Tell whether two ranges share a number; with steps that differ, whether they could."""
    return (
        max(first[0], second[0]) < min(first[1], second[1]) and (first[0] - second[0]) % gcd(first[2], second[2]) == 0
    )
