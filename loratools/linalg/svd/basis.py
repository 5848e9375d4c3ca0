"""A block Krylov basis of a float32 matrix in the processor's memory, in C and NumPy alone.

The steps of `krylov.py` for a rank that is given. Sums are the C's, and LAPACK sees small matrices of float64 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.linalg.native import delta
from loratools.linalg.svd.start import random_columns
from loratools.linalg.svd.stopping import CAUTION, hidden, is_crowded, to_come

Array = np.ndarray[Any, np.dtype[Any]]

LEFT = 1e-2
"""Below this share of ‖D‖², ‖D‖² - Σσ² is a difference of nearly equal numbers, and bfloat16 too coarse to seek it."""
FAR = 30
"""A gain of so many tolerances is not the last one."""
EXTRA_BLOCKS, EXTRA = 6, 192
"""Blocks, and columns, kept beyond the wanted rank; more bounds memory and the size of the small problem."""
COARSE = 1e-4
"""A hundred times what rounding to bfloat16 puts into each direction: ‖D‖²·(2^-8)²/12 over the short side."""
ALIKE = 1.1
"""Values of θ this close to one another may be one repeated value to the iteration, for the few steps it makes."""
EXACT_SIDE, EXACT_SIDE_LARGE_RANK = 256, 512
"""Up to this short side the exact solution is as fast as a sketch; up to the next it is used for large ranks."""
MODERATE = 40
"""‖D‖_F within so many powers of two: no square of what matters in it over- or underflows in float32."""
SUMS = 1e-4
"""Far more than sums of float32 products are off, as a share."""
OFF, FINE = 10.0, 5e-7
"""Units of rounding that θ of a direction with one number is off, and the share of the error that this may be."""

EPS = float(np.finfo(np.float32).eps)
# What Cholesky leaves of each column of length one: below the first one pass does not make them orthonormal, below the
# second products with Dᵀ are not taken through them, and below the last directions would have to be dropped.
_CLEAR, _APART, _DEPENDENT = 0.125, 0.03, 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """D (m, n) as C takes it: `rows` is D, or Dᵀ where `turned`; its own rows are contiguous."""

    rows: Array
    turned: bool

    @classmethod
    def of(cls, D: Array) -> Matrix | None:
        """Return D if its rows, or columns, are contiguous."""
        turned = D.strides[1] != D.itemsize
        return None if turned and D.strides[0] != D.itemsize else cls(D.T if turned else D, turned)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        m, n = self.rows.shape
        return (n, m) if self.turned else (m, n)

    def times(self, X: Array) -> Array:
        """Return D·X."""
        return delta.across(self.rows, X) if self.turned else delta.times(self.rows, X)

    def across(self, X: Array) -> Array:
        """Return Dᵀ·X."""
        return delta.times(self.rows, X) if self.turned else delta.across(self.rows, X)

    def both(self, X: Array) -> tuple[Array, Array | None]:
        """Return Y = D·X, and DᵀY where one pass over D gives both."""
        if self.turned or self.rows.dtype != np.float32:
            return self.times(X), None
        return delta.both(self.rows, X)


def is_exact(short: int, rank: int) -> bool:
    """Tell whether a matrix of this short side is solved through its whole Gram matrix for this rank."""
    return short <= EXACT_SIDE or (short <= EXACT_SIDE_LARGE_RANK and 8 * rank > short) or 2 * rank >= short


def block_of(rank: int, *, wide: bool) -> int:
    """Return how many columns are multiplied at once.

    Narrow, so that the basis deepens: with half the rank a quarter fewer products do. Those in bfloat16 cost little
    beside reading D, which is read less often for wide blocks.
    """
    return min(64, max(16, -(-rank // (16 if wide else 32)) * 16))


class Basis:
    """V (n, k) orthonormal, Y = D·V and G = YᵀY in float64, one block of columns after the other."""

    def __init__(self, D: Matrix, block: int, most: int, seed: int) -> None:
        m, n = D.shape
        self.D = D
        self.block = block
        self._V = np.empty((n, most), np.float32)
        self._Y = np.empty((m, most), np.float32)
        self.width = 0
        self.G = np.empty((0, 0))
        self.products = block
        self.estimate = 0.0
        self._seed = seed
        self._back: Array | None = None
        self._eigen: tuple[int, Array, Array] | None = None

    @property
    def V(self) -> Array:
        """Return the columns so far."""
        return self._V[:, : self.width]

    @property
    def Y(self) -> Array:
        """Return their products with D."""
        return self._Y[:, : self.width]

    @classmethod
    def grown(
        cls, D: Matrix, rank: int, norm2: float, tolerance: float, seed: int, *, rough: bool = False
    ) -> Basis | None:
        """Return a basis of the leading directions, by the rule of `krylov.iterate`; None for what is unusual."""
        (m, n), block = D.shape, block_of(rank, wide=rough)
        most = min(rank + 2 * max(EXTRA_BLOCKS * block, EXTRA), n // 2)  # it does not restart
        basis = cls(D, block, most, seed)
        new = _orthonormal(D.across(random_columns(m, block, seed)))
        last: tuple[Array, float | None] | None = None  # the values wanted, gain
        left = norm2
        onward = True
        while new is not None and basis.width + block <= most:
            basis.append(new, onward=onward)
            if basis.width >= rank + block:
                # Where this may be the last step the vectors are asked for next.
                theta = np.linalg.eigvalsh(basis.G)[::-1] if onward else basis.leading()[0]
                if theta[-1] <= (COARSE * norm2 / n if rough else (4 * EPS) ** 2 * theta[0]):
                    return None
                captured = float(theta[:rank].sum())
                left, gain = norm2 - captured, None
                if left < LEFT * norm2 or _repeated(theta[:rank], block):
                    return None
                if last is not None:
                    gain = max(captured - float(last[0].sum()), 0.0)
                    crowded = is_crowded(theta, rank, block)
                    basis.estimate = to_come(gain, last[1], crowded=crowded)
                    if CAUTION * basis.estimate <= tolerance * left:
                        missed = hidden(theta[:rank], last[0], basis.seen(rank), crowded=crowded)
                        basis.estimate = max(basis.estimate, missed)
                        if CAUTION * missed <= tolerance * left:
                            return basis
                last = theta[:rank], gain
                onward = gain is None or gain > FAR * tolerance * left
            new = basis.news()
        return None

    def append(self, new: Array, *, onward: bool) -> None:
        """Add orthonormal columns, orthogonal to V; `onward` forms what `news` needs in the same pass over D."""
        Y, self._back = self.D.both(new) if onward else (self.D.times(new), None)
        old, self.width = self.width, self.width + new.shape[1]
        self._V[:, old : self.width], self._Y[:, old : self.width] = new, Y
        self.products += new.shape[1]
        edge = delta.gram(self.Y, Y)
        G = np.empty((self.width, self.width))
        G[:old, :old], G[:, old:], G[old:, :] = self.G, edge, edge.T
        self.G = G

    def news(self) -> Array | None:
        """Return an orthonormal basis of what Dᵀ·(last block of Y) adds to V; None where columns depend on others."""
        last = self.G[-self.block :, -self.block :]
        change, apart = _change(last)
        self.products += self.block
        if change is None:
            return None
        if self._back is not None and apart > _APART:
            W = delta.times(self._back, change)
        else:
            Q = delta.times(self._Y[:, self.width - self.block : self.width], change)
            if apart <= _CLEAR:
                again = _orthonormal(Q)
                if again is None:
                    return None
                Q = again
            W = self.D.across(Q)
        return _orthonormal(W, self.V)

    def leading(self) -> tuple[Array, Array]:
        """Return θ and X, the eigenvalues and eigenvectors of G, the largest first."""
        if self._eigen is None or self._eigen[0] != self.width:
            self._eigen = self.width, *descending(self.G)
        return self._eigen[1:]

    def seen(self, rank: int) -> Array:
        """Return Sᵀ·D·v for the columns of the sketch S and the leading directions v, (block, r): see `hidden`."""
        first = delta.gram(self._Y[:, : self.block], random_columns(len(self._Y), self.block, self._seed))
        seen: Array = first.T @ self.leading()[1][: self.block, :rank]  # later columns of V are orthogonal to Dᵀ·S
        return seen

    def directions(self, rank: int) -> Array:
        """Return the leading directions (n, r), orthonormal."""
        return delta.times(self.V, self.leading()[1][:, :rank].astype(np.float32))

    def beyond(self, rank: int, lost2: float) -> float:
        """Return what a basis of products in bfloat16 proves of D beyond `rank` directions (`energy_beyond`)."""
        bits = np.ascontiguousarray(self.V).view(np.uint32)
        upper = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
        multiplied = upper.view(np.float32)
        largest = float(np.abs(delta.gram(multiplied, multiplied)).sum(1).max())  # ≥ λ₁, by Gershgorin
        tail = float(np.maximum(np.linalg.eigvalsh(self.G)[: self.width - rank], 0).sum())
        return (1 - SUMS) * max(math.sqrt(tail / largest) - math.sqrt(lost2), 0.0) ** 2


def _orthonormal(W: Array, V: Array | None = None) -> Array | None:
    """Return an orthonormal basis of the columns of W (n, b), less what they have of V; None where they depend on it.

    Block Gram-Schmidt, done twice, the second time with sums in float64, then Cholesky's factor of WᵀW; and all of that
    once more where columns depended on each other so much that it brought V back.
    """
    for turn in range(3):
        parts: list[Array] = []
        for _ in range(0 if V is None else 2):
            assert V is not None
            parts.append(delta.gram(V, W) if parts else delta.across(V, W))
            W = W - delta.times(V, parts[-1].astype(np.float32, copy=False))
        G = delta.gram(W, W)
        if parts and turn == 0 and (G.diagonal() <= (16 * EPS) ** 2 * np.square(parts[0]).sum(0)).any():
            return None
        change, apart = _change(G)
        if change is None:
            return None
        W = delta.times(W, change)
        if apart > _CLEAR:
            return W
    return None


def _change(G: Array) -> tuple[Array | None, float]:
    """Return R that makes columns orthonormal whose Gram matrix is G, float32, and what Cholesky left of a column.

    None where they depend on each other.
    """
    lengths = np.sqrt(np.maximum(G.diagonal(), 0))
    if not (lengths > 0).all():
        return None, 0.0
    try:
        L = np.linalg.cholesky(G / lengths / lengths[:, None])
    except np.linalg.LinAlgError:
        return None, 0.0
    apart = float(L.diagonal().min())
    if apart <= _DEPENDENT:
        return None, apart
    return np.linalg.solve(L, np.diag(1 / lengths)).T.astype(np.float32), apart


def descending(G: Array) -> tuple[Array, Array]:
    """Return the eigenvalues and eigenvectors of a Gram matrix, the largest first."""
    theta, X = np.linalg.eigh(G)
    return theta[::-1], X[:, ::-1]


def _repeated(theta: Array, fresh: int) -> bool:
    """Tell whether a value comes as often as there were random columns, so that there may be more of it."""
    copies = theta[fresh - 1 :]
    return bool(((theta[: len(copies)] <= ALIKE * copies) & (copies > 1.001 * theta[-1])).any())
