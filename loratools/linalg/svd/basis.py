"""A block Krylov basis of a float32 matrix in the processor's memory, in C and NumPy alone.

The steps of `krylov.py` for a rank that is given. Sums are the C's, and LAPACK sees small matrices of float64 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.linalg.native import delta
from loratools.linalg.native.blocks import Steps
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
    """V (n, k) orthonormal, Y = D·V and G = YᵀY in float64, one block of columns after the other.

    `products` counts columns that D was multiplied with, `estimate` is what is still to be won.
    """

    def __init__(self, D: Matrix, block: int, room: int, seed: int) -> None:
        self.block = block
        self.products = block
        self.estimate = 0.0
        self._S = random_columns(D.shape[0], block, seed)
        self._steps = Steps(D.rows, D.turned, block, room)
        self._eigen: tuple[int, Array, Array] | None = None

    @property
    def width(self) -> int:
        """Return k."""
        return self._steps.width

    @property
    def V(self) -> Array:
        """Return the columns so far."""
        return self._steps.V

    @property
    def Y(self) -> Array:
        """Return their products with D."""
        return self._steps.Y

    @property
    def G(self) -> Array:
        """Return YᵀY."""
        return self._steps.G

    @classmethod
    def grown(
        cls, D: Matrix, rank: int, norm2: float, tolerance: float, seed: int, *, rough: bool = False
    ) -> Basis | None:
        """Return a basis of the leading directions, by the rule of `krylov.iterate`; None for what is unusual."""
        n, block = D.shape[1], block_of(rank, wide=rough)
        most = min(rank + 2 * max(EXTRA_BLOCKS * block, EXTRA), n // 2)  # it does not restart
        basis = cls(D, block, min(rank + EXTRA_BLOCKS * block, most), seed)
        last: tuple[Array, float | None] | None = None  # the values wanted, gain
        left = norm2
        onward = True
        while basis.width + block <= most and basis.step(onward=onward):
            if basis.width < rank + block:
                continue
            # Where this may be the last step the vectors are asked for next.
            theta = basis.leading(0 if onward else rank)[0]
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
        return None

    def step(self, *, onward: bool) -> bool:
        """Add what Dᵀ·(last block of Y), or at first DᵀS, adds to V; return False where columns depend on others.

        `onward` forms what the next step needs in the same pass over D.
        """
        first = not self.width
        self.products += self.block if first else 2 * self.block
        return self._steps.step(self._S if first else None, onward=onward)

    def leading(self, count: int) -> tuple[Array, Array]:
        """Return all eigenvalues of G, the largest first, and the eigenvectors X (k, `count`) of the largest."""
        if self._eigen is None or self._eigen[0] != self.width or self._eigen[2].shape[1] < count:
            self._eigen = self.width, *eigenvectors(self.G, count)
        return self._eigen[1], self._eigen[2][:, :count]

    def seen(self, rank: int) -> Array:
        """Return Sᵀ·D·v for the columns of the sketch S and the leading directions v, (block, r): see `hidden`."""
        first = delta.gram(self.Y[:, : self.block], self._S)
        seen: Array = first.T @ self.leading(rank)[1][: self.block]  # later columns of V are orthogonal to Dᵀ·S
        return seen

    def directions(self, rank: int) -> Array:
        """Return the leading directions (n, r), orthonormal."""
        return delta.times(self.V, self.leading(rank)[1].astype(np.float32))

    def beyond(self, rank: int, lost2: float) -> float:
        """Return what a basis of products in bfloat16 proves of D beyond `rank` directions (`energy_beyond`)."""
        bits = np.ascontiguousarray(self.V).view(np.uint32)
        upper = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
        multiplied = upper.view(np.float32)
        largest = float(np.abs(delta.gram(multiplied, multiplied)).sum(1).max())  # ≥ λ₁, by Gershgorin
        tail = float(np.maximum(self.leading(0)[0][rank:], 0).sum())
        return (1 - SUMS) * max(math.sqrt(tail / largest) - math.sqrt(lost2), 0.0) ** 2


def _repeated(theta: Array, fresh: int) -> bool:
    """Tell whether a value comes as often as there were random columns, so that there may be more of it."""
    copies = theta[fresh - 1 :]
    return bool(((theta[: len(copies)] <= ALIKE * copies) & (copies > 1.001 * theta[-1])).any())


def eigenvectors(G: Array, count: int) -> tuple[Array, Array]:
    """Return all eigenvalues of a symmetric G (k, k), the largest first, and vectors (k, `count`) of the largest."""
    if not count:
        return np.linalg.eigvalsh(G)[::-1], np.empty((len(G), 0))
    theta, X = np.linalg.eigh(G)
    return theta[::-1], X[:, : -count - 1 : -1]
