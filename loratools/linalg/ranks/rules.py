"""Rules that choose the rank of one matrix from its singular values.

A rule is a frozen dataclass with `rank(spectrum)`. It may be shown only the leading singular values: it then returns
None when it needs to see more. A rule never returns 0 for a matrix that is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Values = Tensor | np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """What is known of a matrix D: leading singular values, ‖D‖_F² and the shape (m, n).

    `sigma` is descending, float64 (k,), k ≥ 1, of torch or NumPy; `complete` says that the singular values not in it
    are all zero. `residual_edges()`, where D itself is at hand, is (k,): element r-1 is the max row norm + max column
    norm of D less its r-1 leading directions, which is as large as the next singular value can be if that residual is
    noise.
    """

    sigma: Values
    norm2: float
    shape: tuple[int, int]
    complete: bool = True
    residual_edges: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.sigma) == 0 or not float(self.sigma[0]) > 0:
            raise ValueError("a matrix that is zero has no rank to choose: leave its module out")


class RankRule(Protocol):
    """Choose a rank; see the classes of this module."""

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the rank, at least 1, or None when more singular values must be known."""
        ...


FULL = 1 << 20
"""A rank that no matrix has: all of its singular values."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Keep r singular values, or as many as there are."""

    r: int

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"a rank must be at least 1, not {self.r}")

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return min(r, number of singular values)."""
        known = len(spectrum.sigma)
        return self.r if self.r <= known else known if spectrum.complete else None


@dataclass(frozen=True, slots=True)
class Energy:
    """Keep the fewest singular values with Σ_{i≤r} σᵢ² ≥ fraction·‖D‖_F² (PEFT's float rank)."""

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction("energy", self.fraction)

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return that number, or every singular value where rounding keeps the sum below the target."""
        captured = (spectrum.sigma**2).cumsum(0)
        return _first(captured >= self.fraction * spectrum.norm2 * (1 - 1e-12), spectrum)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Keep σᵢ > fraction·σ₁."""

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction("ratio", self.fraction)

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the number of such singular values, at least 1."""
        return _above(self.fraction * float(spectrum.sigma[0]), spectrum)


@dataclass(frozen=True, slots=True)
class Absolute:
    """Keep σᵢ > floor, and at least σ₁ (mergekit's --sv-epsilon, which may keep none)."""

    floor: float

    def __post_init__(self) -> None:
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"a floor for singular values must be a number of at least 0, not {self.floor}")

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the number of such singular values, at least 1."""
        return _above(self.floor, spectrum)


@dataclass(frozen=True, slots=True)
class SvRatio:
    """Keep σᵢ > σ₁/t: kohya's sv_ratio."""

    t: float

    def __post_init__(self) -> None:
        if not self.t >= 1:
            raise ValueError(f"sv_ratio is σ₁ over the smallest σ kept and must be at least 1, not {self.t}")

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the number of such singular values, at least 1."""
        return _above(float(spectrum.sigma[0]) / self.t, spectrum)


@dataclass(frozen=True, slots=True)
class SvFro:
    """Keep the fewest singular values with Σ_{i≤r} σᵢ² ≥ t²·‖D‖_F²: kohya's sv_fro, t is a share of the norm."""

    t: float

    def __post_init__(self) -> None:
        _check_fraction("sv_fro", self.t)

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the rank of Energy(t²)."""
        return Energy(self.t * self.t).rank(spectrum)


@dataclass(frozen=True, slots=True)
class SvCumulative:
    """Keep the fewest singular values with Σ_{i≤r} σᵢ ≥ t·Σσᵢ: kohya's sv_cumulative.

    It needs the whole spectrum: that of factors, or of a small matrix.
    """

    t: float

    def __post_init__(self) -> None:
        _check_fraction("sv_cumulative", self.t)

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return that number; raise ValueError unless the spectrum is complete: an unseen tail has no known sum."""
        if not spectrum.complete:
            raise ValueError(
                "sv_cumulative needs every singular value, and a large dense matrix shows only the leading ones; "
                "use energy or sv_fro, which need the norm only"
            )
        captured = spectrum.sigma.cumsum(0)
        return _first(captured >= self.t * captured[-1] * (1 - 1e-12), spectrum)


@dataclass(frozen=True, slots=True)
class Bounded:
    """Keep what another rule keeps, within [minimum, maximum] and rounded up to a multiple."""

    rule: RankRule
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_bounds(self.minimum, self.maximum, self.multiple_of)

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the bounded rank, never more than there are singular values.

        Where the maximum or the number of singular values is not a multiple, it wins over rounding up.
        """
        known, rank = len(spectrum.sigma), self.rule.rank(spectrum)
        if rank is None:
            reached = self.maximum is not None and known >= self.maximum
            return self.maximum if reached else None
        rank = bounded(rank, self.minimum, self.maximum, self.multiple_of)
        return rank if rank <= known else known if spectrum.complete else None


def bounded(rank: int, minimum: int, maximum: int | None, multiple_of: int) -> int:
    """Return `rank` rounded up to a multiple and clipped to [minimum, maximum]."""
    rank = -(-max(rank, minimum) // multiple_of) * multiple_of
    return rank if maximum is None else min(rank, maximum)


def check_bounds(minimum: int, maximum: int | None, multiple_of: int) -> None:
    """Raise ValueError, in one sentence, unless 0 ≤ minimum ≤ maximum and multiple_of ≥ 1."""
    if minimum < 0 or multiple_of < 1 or (maximum is not None and maximum < max(minimum, 1)):
        raise ValueError(
            f"ranks between {minimum} and {maximum} in multiples of {multiple_of} cannot be: "
            "0 ≤ minimum ≤ maximum, maximum ≥ 1 and multiple ≥ 1 are needed"
        )


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is a share and must lie above 0 and at most at 1, not {value}")


def at_least_one(count: int, spectrum: Spectrum) -> int | None:
    """Return `count` but at least 1; None when all known values pass and more may follow."""
    return max(1, count) if count < len(spectrum.sigma) or spectrum.complete else None


def _above(floor: float, spectrum: Spectrum) -> int | None:
    return at_least_one(int((spectrum.sigma > floor).sum()), spectrum)


def _first(reached: Values, spectrum: Spectrum) -> int | None:
    if bool(reached.any()):
        return int((~reached).sum()) + 1  # what is captured grows: once reached, it stays so
    return len(spectrum.sigma) if spectrum.complete else None
