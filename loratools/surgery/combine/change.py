"""The combined change of a module, in numbers: its spectrum, the rank that is chosen for it, and what is stored.

`products` works out the sums of products, many modules at once; `elementwise` what the other methods make, one module
after the other. The error of a result, as stored, is √(Σ_{i>r} σᵢ² + ‖rounding‖²): the optimum, and what rounding adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter, counted
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Spectrum, bounded
from loratools.storage import dtypes
from loratools.storage.lazy import LazyTensor


class Known(NamedTuple):
    """Singular values of one matrix, ‖ΔW‖_F², what of it they leave out, and its sides."""

    sigma: tuple[float, ...]
    norm2: float
    lost2: float
    sides: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Change:
    """What is known of one change: its singular values `sigma`, descending, as far as it was decomposed.

    `norm2` is ‖ΔW‖_F², `lost2` what is not in `sigma`; 0 for a product. `sides` (m, n) are those of the matrix, whose
    sum a rank costs; of a stack those of all experts together. `size` is Σ |wᵢ|·‖ΔWᵢ‖_F of what went in: where that is
    far larger, the terms cancel. Of a stack of experts `each` is what is known of every expert, and σᵢ the root of
    the energy that all their i-th directions hold, since one rank is for all.
    """

    sigma: tuple[float, ...]
    norm2: float
    lost2: float
    sides: tuple[int, int]
    size: float = 0.0
    each: tuple[Known, ...] = ()

    @classmethod
    def of_stack(cls, each: Sequence[Known], count: int, size: float) -> Change:
        """Return the change of a stack of `count` experts, of those whose change is not zero."""
        sigma2 = np.zeros(max(len(known.sigma) for known in each))
        for known in each:
            sigma2[: len(known.sigma)] += np.square(known.sigma)
        m, n = each[0].sides
        return cls(
            tuple(np.sqrt(sigma2).tolist()), math.fsum(known.norm2 for known in each),
            math.fsum(known.lost2 for known in each), (count * m, count * n), size, tuple(each),
        )  # fmt: skip

    @property
    def spectra(self) -> tuple[Known, ...]:
        """What is known of each matrix by itself."""
        return self.each or (Known(self.sigma, self.norm2, self.lost2, self.sides),)

    def optimum2(self, rank: int) -> float:
        """Return the least squared error of any result of this rank."""
        return self.lost2 + math.fsum(sigma * sigma for sigma in self.sigma[rank:])


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is stored of a change: left (m, r) and right (r, n), of a stack (E, m, r) and (E, r, n), in the final dtype.

    `rounding2` is the square of what the rounding changes, ‖left·right − exact‖_F², and `energy` ‖exact‖_F².
    """

    left: LazyTensor
    right: LazyTensor
    rounding2: float
    energy: float

    def fault(self, dtype: str) -> str | None:
        """Return why a change cannot be stored in `dtype`, or None."""
        if not math.isfinite(self.rounding2):
            return f"its factors have numbers beyond {dtype}; {dtypes.holders(dtype)} (--dtype)"
        if self.energy > 0 and self.rounding2 > 0.999 * self.energy:
            return f"its factors are too small for {dtype} and would become zero; {dtypes.holders(dtype)} (--dtype)"
        return None


class Settled(NamedTuple):
    """One module: its change, the rank that was chosen, and what is stored."""

    change: Change
    rank: int
    kept: Kept


@dataclass(frozen=True, slots=True)
class Share:
    """What one module keeps.

    `given` is the sum of the ranks that came in, `true_rank` the number of nonzero singular values, `rank` what is
    kept; `norm` is ‖ΔW‖_F, `error` ‖ΔW − result‖_F as stored, `optimum` the least that any result of this rank has.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    given: int
    true_rank: int
    rank: int
    norm: float
    error: float
    optimum: float
    largest: float
    smallest: float

    @property
    def energy(self) -> float:
        """Share of ‖ΔW‖_F² that is kept."""
        return 1 - (self.error / self.norm) ** 2 if self.norm else 1.0


def choose(changes: Sequence[Change], ranks: Ranks | None) -> list[int]:
    """Return the rank that each change keeps, at least 1: all there is without `ranks`.

    Raises `ValueError` for a budget that is too small.
    """
    most = [len(change.sigma) for change in changes]
    if ranks is None or not changes:
        return most
    shapes = [change.sides for change in changes]
    if ranks.budget is not None:
        return list(ranks.decide([change.sigma for change in changes], shapes, [True] * len(changes)).ranks)
    rule, wanted = ranks.first(shapes, 0.0), []
    for change, limit in zip(changes, most, strict=True):
        asked = [
            None if lost2 else rule.rank(Spectrum(np.array(sigma), norm2, sides))
            for sigma, norm2, lost2, sides in change.spectra
        ]
        wanted.append(min(limit, max(limit if rank is None else rank for rank in asked)))
    if ranks.uniform:
        rank = bounded(max(wanted), ranks.minimum, ranks.maximum, ranks.multiple_of)
        wanted = [min(rank, limit) for limit in most]
    return wanted


def refused(problems: Mapping[str, str]) -> IncompatibleAdapter:
    """Return the error that names every module that cannot be worked on, and why."""
    lines = [f"{module}: {problem}" for module, problem in sorted(problems.items(), key=lambda item: natural(item[0]))]
    return IncompatibleAdapter(f"{counted(len(lines), 'module')} cannot be worked on", lines)
