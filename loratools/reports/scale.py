"""Scales: where a number stands between two others, in colour and along an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEVELS = 9
"""Colours of a scale. Their lightness alone tells them apart, so that they read without colour too."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours from `low` to `high`: of one hue, or, where it is `signed`, of two that meet at the middle.

    The style has the colours, by the names of their levels: s0 (low) to s8, d0 (low) to d8.
    """

    low: float
    high: float
    signed: bool = False

    @classmethod
    def of(cls, values: list[float], *, signed: bool = False) -> Scale:
        """Return the scale from 0 to a round number above all of the values; a signed one from its negative."""
        most = round_up(max((abs(value) for value in values if math.isfinite(value)), default=0.0))
        return cls(-most if signed else 0.0, most, signed)

    def level(self, value: float) -> str:
        """Return the name of the colour of a value; one beyond an end has the colour of that end."""
        share = (value - self.low) / (self.high - self.low) if math.isfinite(value) else float(value > 0)
        level = min(LEVELS - 1, max(0, math.floor(share * LEVELS)))
        return f"{'d' if self.signed else 's'}{level}"

    def levels(self) -> list[str]:
        """Return the names of all its colours, low first."""
        return [f"{'d' if self.signed else 's'}{level}" for level in range(LEVELS)]


def round_up(value: float) -> float:
    """Return the least of 1, 2, 2.5, 5 × 10ⁿ that is not below a value; 1 for 0.

    Example:
        >>> round_up(0.0), round_up(0.37), round_up(2.1), round_up(7.0)
        (1.0, 0.5, 2.5, 10.0)
    """
    if value <= 0:
        return 1.0
    power = math.floor(math.log10(value))
    steps = (1.0, 2.0, 2.5, 5.0, 10.0)
    return next((round_to(step, power) for step in steps if round_to(step, power) >= value), round_to(1.0, power + 1))


def round_to(step: float, power: int) -> float:
    """Return step × 10^power, rounded as its decimal text is read."""
    return float(f"{step}e{power}")


def ticks(low: float, high: float, most: int = 5, *, integers: bool = False) -> list[float]:
    """Return at most `most` + 1 round numbers from `low` to `high`.

    Example:
        >>> ticks(0.0, 1.0), ticks(1, 8, integers=True)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.0, 4.0, 6.0, 8.0])
    """
    step = round_up((high - low) / most)
    step = max(1.0, math.ceil(step)) if integers else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def decades(low: float, high: float, most: int = 5) -> list[int]:
    """Return powers of ten from the one below `low` to the one above `high`, at most `most` + 1 of them.

    Example:
        >>> decades(0.002, 1.0)
        [-3, -2, -1, 0]
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    step = math.ceil((last - first) / most)
    return list(range(last, first - 1, -step))[::-1]


def few_ranks(most: int) -> list[int]:
    """Return the ranks of a table from 1 to `most`: each up to 4, then two in every doubling, and the last.

    Example:
        >>> few_ranks(20)
        [1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    usual = [1, 2, 3, *(size << i for i in range(16) for size in (4, 6))]
    return sorted({*(rank for rank in usual if rank < most), *([most] if most else [])})
