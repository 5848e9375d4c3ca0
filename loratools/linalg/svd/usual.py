"""The usual case without torch: the leading part, of a rank that is given, of a float32 matrix with much beside it.

The iteration of `krylov.py` with its stopping rule, in C and NumPy alone: importing torch takes as long as a tenth of a
model's extraction, and each of its small steps longer than the arithmetic. What is unusual is left to
`truncated.py`, which asks the same of any matrix: D of so low a rank that ‖D‖² − Σσ² would cancel, repeated singular
values, columns that depend on each other, a spectrum that does not end within a basis of some four hundred columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from loratools.linalg.native import blocks, delta
from loratools.linalg.svd.basis import EPS, FINE, LEFT, MODERATE, OFF, Basis, Matrix, eigenvectors, is_exact

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Leading:
    """The rank-r part of D as balanced factors B (m, r) and A (r, n), float32, with its certificate.

    `S` (r,) are its singular values, float64, descending; the rest is what `TruncatedSVD` says under these names.
    """

    B: Array
    A: Array
    S: Array
    norm2: float
    error2: float
    excess_bound: float
    excess_estimate: float
    products: int
    rounded: bool = False

    @property
    def rank(self) -> int:
        """Return r, the number of singular values."""
        return len(self.S)


def leading(
    D: Array, rank: int, norm2: float, *, tolerance: float = 3e-4, seed: int = 0, low: Array | None = None,
    lost2: float = 0.0,
) -> Leading | None:  # fmt: skip
    """Return the rank-r part of D (m, n), float32, as `truncated_svd` does; None where that has to.

    Args:
        D: The matrix; rows, or columns, are contiguous. ‖D‖_F² is `norm2`, which is finite.
        rank: r; as many singular values are taken, and no fewer.
        norm2: ‖D‖_F², summed in float64.
        tolerance: By which share the squared error may exceed the optimum, about. Default: 3e-4.
        seed: A whole number that chooses the sketch. Default: 0.
        low: D in bfloat16, its bits, laid out like D, if products with it are to find the directions. Default: none.
        lost2: ‖D − low‖_F². Default: 0.
    """
    m, n = D.shape
    short = min(m, n)
    if not blocks.available() or norm2 <= 0 or rank >= short or abs(math.frexp(math.sqrt(norm2))[1]) > MODERATE:
        return None
    tall = Matrix.of(D if m >= n else D.T)
    if is_exact(short, rank):
        found = _exact(tall, rank, norm2) if tall is not None else None
    else:
        small = None if low is None else Matrix.of(low if m >= n else low.T)
        found = _iterated(tall, rank, norm2, tolerance, seed, small, lost2) if tall is not None else None
    if found is None or m >= n:
        return found
    return replace(found, B=found.A.T, A=found.B.T)


def _exact(D: Matrix, rank: int, norm2: float) -> Leading | None:
    """Return the rank-r part through DᵀD, in float64."""
    rows = np.ascontiguousarray(D.rows.T) if D.turned else D.rows
    theta, X = eigenvectors(delta.gram(rows, rows), rank)
    return _part(D, D.times, None, theta, X, rank, norm2, 0.0, 0.0, D.shape[1])


def _iterated(
    D: Matrix, rank: int, norm2: float, tolerance: float, seed: int, low: Matrix | None, lost2: float
) -> Leading | None:
    if low is not None and (basis := Basis.grown(low, rank, norm2, tolerance, seed, rough=True)):
        V = basis.directions(rank)
        Y = D.times(V)
        theta, X = eigenvectors(delta.gram(Y, Y), rank)
        unseen = max(norm2 - float(theta.sum()) - basis.beyond(rank, lost2), 0.0)
        onto = partial(delta.times, Y)
        made = _part(D, onto, V, theta, X, rank, norm2, unseen, basis.estimate, basis.products + rank, True)
        if made:
            return made
    basis = Basis.grown(D, rank, norm2, tolerance, seed)
    if basis is None:
        return None
    unseen = max(norm2 - float(basis.G.trace()), 0.0)
    Z = basis.leading(rank)[1].astype(np.float32)
    Y, V = delta.times(basis.Y, Z), delta.times(basis.V, Z)
    theta, X = eigenvectors(delta.gram(Y, Y), rank)  # what G has as zeros is in them
    return _part(D, partial(delta.times, Y), V, theta, X, rank, norm2, unseen, basis.estimate, basis.products)


def _part(
    D: Matrix, onto: Callable[[Array], Array], V: Array | None, theta: Array, X: Array, rank: int, norm2: float,
    unseen: float, estimate: float, products: int, rounded: bool = False,
) -> Leading | None:  # fmt: skip
    """Return the factors Y·X and V·X of the leading eigenvectors X of YᵀY, each with √σ; `onto` gives Y·Z, no V is I.

    None where little of D is left, or a singular value is that of rounding.
    """
    theta = np.maximum(theta[:rank], 0)
    error2 = norm2 - float(theta.sum())
    if error2 < LEFT * norm2 or not theta[-1] > (4 * EPS) ** 2 * theta[0]:
        return None
    S = np.sqrt(theta)
    left, right = (X / np.sqrt(S)).astype(np.float32), (X * np.sqrt(S)).astype(np.float32)
    B, A = onto(left), (right if V is None else delta.times(V, right)).T
    off2 = _miscounted(D, B, A, S, error2)
    error2 += off2
    bound = min(max(unseen + off2, 0.0) + EPS**2 * norm2, error2)
    return Leading(B, A, S, norm2, error2, bound, min(estimate, error2), products, rounded)


def _miscounted(D: Matrix, B: Array, A: Array, S: Array, error2: float) -> float:
    """Return what rounding left out of ‖D − B·A‖² = `error2`, where that may be more than `FINE` of it.

    Roundings of many numbers of one size cancel, those of one do not: of a direction u·vᵀ they leave √Σuᵢ⁴ + √Σvⱼ⁴.
    For the directions B·A of which that matters it is ‖D‖² − 2⟨D, B·A⟩ + tr(BᵀB·AAᵀ), in float64, less ‖D‖² − Σσ².
    Of the others it is what the length of v is not one, for all of its numbers alike.
    """
    theta = np.square(S)
    some = int((2 * OFF * EPS * theta > FINE * error2).sum())  # θ is descending
    if not some:
        return 0.0
    B, right, theta = B[:, :some], A[:some].T, theta[:some]
    squares = B * B, right * right
    narrow = sum(np.sqrt((X * X).sum(0)) / X.sum(0) for X in squares)
    chosen = OFF * EPS * theta * narrow > FINE * error2
    lengths2 = squares[1].sum(0, dtype=np.float64) / S[:some]
    off2 = float((theta * (lengths2 - 1))[~chosen].sum())
    if not chosen.any():
        return off2
    B, right = np.ascontiguousarray(B[:, chosen]), np.ascontiguousarray(right[:, chosen])
    first, last = (right, B) if D.turned else (B, right)
    inner = float((delta.gram(D.rows, first) * last).sum())
    square = float((delta.gram(B, B) * delta.gram(right, right)).sum())
    return off2 + square - 2 * inner + float(theta[chosen].sum())
