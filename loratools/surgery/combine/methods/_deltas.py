"""The changes that several adapters make to one matrix, a few rows at a time: never all of them dense at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loratools.surgery.combine.methods._terms import Terms

Bits = npt.NDArray[np.int32] | npt.NDArray[np.int64]

TILE = 1 << 20
"""Elements of a tile. It belongs to what a seed means: draws are made tile by tile."""


class Deltas:
    """Rows of ΔW₁ … ΔW_T of one module, float32, without their weights."""

    def __init__(self, terms: Terms, *, whole: bool = False) -> None:
        self.terms = tuple(terms)
        self.factors = [(term.left.float(), term.right.float()) for term in terms]
        self.device = terms[0].left.device
        self.shape = (terms[0].left.shape[0], terms[0].right.shape[1])
        self.step = self.shape[0] if whole else max(1, TILE // self.shape[1])
        self.weights = torch.tensor([term.weight for term in terms], dtype=torch.float32, device=self.device)[
            :, None, None
        ]

    def tiles(self) -> Iterator[Tensor]:
        """Yield (T, rows, columns), the same numbers every time."""
        return map(torch.stack, zip(*map(self.tiles_of, range(len(self.terms))), strict=True))

    def tiles_of(self, number: int) -> Iterator[Tensor]:
        """Yield (rows, columns) of one adapter."""
        left, right = self.factors[number]
        return (left[start : start + self.step] @ right for start in range(0, self.shape[0], self.step))

    def merged(self, combine: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return the matrix that `combine(rows of all, number of the tile)` makes tile by tile."""
        D, start = torch.empty(self.shape, device=self.device), 0
        for number, tile in enumerate(self.tiles()):
            D[start : start + tile.shape[1]] = combine(tile, number)
            start += tile.shape[1]
        return D

    def cuts(self, *counts: int) -> list[Tensor]:
        """Return the magnitude of the `count`-th largest element of each ΔW, (T, 1, 1), for each count."""
        cuts = [largest(partial(self.tiles_of, i), counts) for i in range(len(self.terms))]
        return [torch.tensor(cut, device=self.device)[:, None, None] for cut in zip(*cuts, strict=True)]

    @property
    def elements(self) -> int:
        """Number of elements of the matrix."""
        return self.shape[0] * self.shape[1]


def largest(tiles: Callable[[], Iterable[Tensor]], counts: Sequence[int]) -> tuple[float, ...]:
    """Return the magnitude of the `count`-th largest element of float32 tiles, exactly, for each count; infinity for 0.

    Two passes: without their sign, floats are in the order of their bits, so a histogram of the upper half of the bits
    finds the bin and one of the lower half inside it the number.
    """
    high = np.zeros(1 << 15, dtype=np.int64)
    for tile in tiles():
        high += _counts(_bits(tile) >> 16, len(high))
    places = {count: _bin(high, count) for count in counts if count > 0}
    low = {upper: np.zeros(1 << 16, dtype=np.int64) for upper, _ in places.values()}
    for tile in tiles():
        bits = _bits(tile)
        for upper, histogram in low.items():
            histogram += _counts(bits[bits >> 16 == upper] & 0xFFFF, len(histogram))
    found = {count: upper << 16 | _bin(low[upper], count - above)[0] for count, (upper, above) in places.items()}
    magnitudes = {count: float(np.uint32(bits).view(np.float32)) for count, bits in found.items()}
    return tuple(magnitudes.get(count, float("inf")) for count in counts)


def _bits(tile: Tensor) -> Any:
    """Return magnitudes as integers in their order, in NumPy, which counts faster, or where the tile is."""
    bits = tile.contiguous().view(torch.int32).reshape(-1)
    return (bits.numpy() if bits.is_cpu else bits) & 0x7FFFFFFF


def _counts(numbers: Any, length: int) -> Bits:
    """Return how often each number below `length` occurs, of NumPy or torch."""
    if isinstance(numbers, Tensor):
        counted: Bits = torch.bincount(numbers, minlength=length).cpu().numpy()
        return counted
    return np.bincount(numbers, minlength=length)


def _bin(histogram: Bits, count: int) -> tuple[int, int]:
    """Return the bin with the `count`-th largest element, and how many elements lie in higher bins."""
    reached = histogram[::-1].cumsum()
    place = int(np.searchsorted(reached, count))
    above = int(reached[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
