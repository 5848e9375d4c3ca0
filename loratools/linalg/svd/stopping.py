"""When an iteration for the leading directions may stop: what is still to be won, estimated from what it shows.

What the last steps won, continued as a geometric series, says how much is to come, unless the last values wanted lie in
a crowd of nearly equal ones. There an iteration spends a step on the crowd and the next on what lies beneath, and so
gains of nothing stand between large ones. That the random columns of the sketch tell: DᵀD's spectral measure that they
see is that of the few values θ of the basis (Gauss quadrature: Golub & Meurant 2010, ch. 7;
to count eigenvalues: Di Napoli, Polizzi & Saad 2016), and so of each θ how many singular values it stands for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

CAUTION = 1.5
"""What is still to be won has been up to 1.3 times the estimate, on noise above all: so much of it counts."""
FASTEST, SLOWEST = 0.1, 0.9
"""The share by which a gain shrinks each step. Never trust less (luck) or more (a plateau) than these."""
CROWDED = 0.5
"""The same for less in a crowd: every second step wins next to nothing there."""
NEAR, CROWD = 0.9, 0.75
"""The last value wanted lies in a crowd where so much of a block, or more, is within so much of its size."""
SETTLED = 1e-3
"""A value of θ that the last step raised by less than this share of what it is above the last one stands for itself."""
SURE = 2.5
"""Outside a crowd, standard deviations of chance beyond which values are held to be hidden."""


def is_crowded(theta: Array, rank: int, block: int) -> bool:
    """Tell whether the last of the `rank` values wanted lies among nearly equal ones; θ (k,) is descending."""
    last = theta[rank - 1]
    return bool(((theta >= NEAR * last) & (theta <= last / NEAR)).sum() >= CROWD * block)


def to_come(gain: float, before: float | None, *, crowded: bool) -> float:
    """Return Σ_{i≥1} gain·qⁱ with q = gain/before, the gains of the last two steps, within trusted bounds."""
    ratio = min(max(gain / before if before else SLOWEST, CROWDED if crowded else FASTEST), SLOWEST)
    return gain * ratio / (1 - ratio)


def hidden(theta: Array, before: Array, seen: Array, *, crowded: bool) -> float:
    """Return Σ_{i≤r} (nᵢ - 1)·(θᵢ - θ_r), what the r values wanted would gain if all that they stand for were seen.

    The best r of any λ sum up to no more than r·t + Σ (λ - t)₊, whatever t is: here θ_r. nᵢ = 3/b·‖seenᵢ‖²/θᵢ, with
    seenᵢ = Sᵀ·D·vᵢ for the b columns of the sketch S and vᵢ of length 1: uᵢᵀ·S holds of each left singular vector b/3
    of energy, give or take √(2/b) of that. Values that have settled are left out: theirs is chance only.

    Args:
        theta: θ (r,), descending and positive.
        before: The same a step earlier.
        seen: (b, r).
        crowded: Whether θ_r lies in a crowd; elsewhere what may be chance is taken off.
    """
    block = len(seen)
    counts = 3 / block * np.square(seen).sum(0) / theta
    above = theta - theta[-1]
    open_ = theta - before > SETTLED * above
    surplus = float(((counts - 1) * above)[open_].sum())
    chance = math.sqrt(2 / block * float((counts * above**2)[open_].sum()))
    return max(surplus - (0.0 if crowded else SURE * chance), 0.0)
