"""The numbers that a code can stand for before it is scaled, and the code that a number becomes.

    Whole    integers of so many bits, counted from the least, or a byte each
    FP4      E2M1; FP6, E2M3: sign and magnitude

A number becomes the nearest code, of two as near the even one; or, where uniform numbers are drawn, one of its two
neighbours, each as often as it is near, so that the expectation of what the code stands for is the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import E2M1

Draw = Callable[[tuple[int, ...]], Array]


class Levels(Protocol):
    """What codes stand for: `table`, float32, by code; `least` and `most` are its ends."""

    @property
    def table(self) -> Array:
        """The numbers by code."""

    @property
    def least(self) -> float:
        """The smallest number."""

    @property
    def most(self) -> float:
        """The largest number."""

    def codes(self, x: Array, draw: Draw | None = None) -> Array:
        """Return the codes of numbers, uint8, in the same shape; NaN becomes the code of 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Integers from -2^(bits-1) to 2^(bits-1)-1, whose code is their distance from the least, or a byte each.

    A byte is in two's complement. Those that are not `signed` count from 0.
    """

    bits: int
    bytes: bool = False
    signed: bool = True

    @property
    def least(self) -> float:
        """The smallest integer."""
        return -float(1 << self.bits - 1) if self.signed else 0.0

    @property
    def most(self) -> float:
        """The largest integer."""
        return self.least + (1 << self.bits) - 1

    @property
    def table(self) -> Array:
        """The integers by code."""
        if self.bytes:
            return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
        return np.arange(self.least, self.most + 1, dtype=np.float32)

    def codes(self, x: Array, draw: Draw | None = None) -> Array:
        """Return the codes of numbers."""
        rounded = np.rint(x) if draw is None else np.floor(x + draw(x.shape))
        whole = np.clip(np.nan_to_num(rounded, nan=0.0), self.least, self.most).astype(np.int16)
        codes: Array = (whole if self.bytes else whole - int(self.least)).astype(np.uint8)
        return codes


@dataclass(frozen=True, slots=True, eq=False)
class Floats:
    """Sign and magnitude: the upper half of the codes is the lower half, negated."""

    table: Array

    @property
    def most(self) -> float:
        """The largest number."""
        return float(self.table[len(self.table) // 2 - 1])

    @property
    def least(self) -> float:
        """The smallest number."""
        return -self.most

    def codes(self, x: Array, draw: Draw | None = None) -> Array:
        """Return the codes of numbers."""
        magnitudes = self.table[: len(self.table) // 2]
        size = np.abs(np.nan_to_num(x, nan=0.0, posinf=self.most, neginf=-self.most))
        if draw is None:
            middles = (magnitudes[1:] + magnitudes[:-1]) / 2
            middles[1::2] = np.nextafter(middles[1::2], np.float32(0))  # there the upper code is the even one
            codes = _above(size, middles)
        else:
            below = np.searchsorted(magnitudes[1:-1], size, side="right")
            step = magnitudes[below + 1] - magnitudes[below]
            codes = (below + (draw(x.shape) < (size - magnitudes[below]) / step)).astype(np.uint8)
        signed: Array = codes | (x < 0).astype(np.uint8) * np.uint8(len(magnitudes))
        return signed


def _above(size: Array, middles: Array) -> Array:
    """Return how many of these each number is above; comparing with a few is faster than searching."""
    if len(middles) > 8:
        return np.searchsorted(middles, size, side="left").astype(np.uint8)
    codes = np.zeros(size.shape, np.uint8)
    for middle in middles:
        codes += size > middle
    return codes


def reach(levels: Levels, *, at_random: bool = False) -> tuple[float, float]:
    """Return the least and the largest number that levels express to within half a step.

    At random a number becomes one of the two levels beside it, so that it must lie between them: `at_random` returns
    the outermost levels, and a little more, for a number that stands for one may be off by its rounding in float32.
    """
    least, most = levels.least, levels.most
    if at_random:
        return least - 1e-3, most + 1e-3
    table = np.unique(levels.table[(levels.table >= least) & (levels.table <= most)].astype(np.float64))
    return float(least - (table[1] - table[0]) / 2), float(most + (table[-1] - table[-2]) / 2)


INT4 = Whole(4)
FP4 = Floats(E2M1)

_E2M3 = np.array([m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)], np.float32)
FP6 = Floats(np.concatenate([_E2M3, -_E2M3]))
