"""One ΔW as its factors or as a dense matrix, and what is asked of both: norms, angles, singular directions; float64.

A product is never multiplied out. A dense matrix is decomposed exactly up to a side of 512. Beyond that its leading
directions are found by block Krylov iteration (`svd/truncated.py`), and its singular values are the roots of those of
DᵀD, a tenth of the time: values under √(ε·side)·σ₁, a millionth, are then not told from rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loratools.errors import counted
from loratools.linalg.factored import FactoredSVD, factored_svd, singular_values
from loratools.linalg.svd.truncated import truncated_svd

_EXACT_SIDE = 512
_TOLERANCE = 1e-8  # of the error² that a rank leaves: its directions are then right to 1e-4 where a gap is 1 %
_EPS = torch.finfo(torch.float64).eps


class Delta(Protocol):
    """A change ΔW (rows, columns) in float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """Sides of the matrix."""

    def norm2(self) -> float:
        """Return ‖ΔW‖_F²."""

    def terms2(self) -> float:
        """Return Σ‖terms‖², of a product those that it adds up, Σⱼ‖bⱼ‖²‖aⱼ‖²: what rounding its factors works on."""

    def inner(self, other: Delta) -> float:
        """Return ⟨ΔW, ΔW'⟩ with a change of the same shape; raise `ValueError` for another shape."""

    def onto(self, D: Tensor) -> float:
        """Return ⟨ΔW, D⟩ with a dense matrix of the same shape."""

    def times(self, X: Tensor) -> Tensor:
        """Return ΔW·X for X (columns, k)."""

    def binned(self, rows: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return L and R (size, k) with L·Rᵀ = S·ΔW·Tᵀ.

        S (size, rows) and T (size, columns) have one ±1 in each column: `rows` and `columns` (int32) are the numbers of
        the row where it stands, plus `size` where it is −1.
        """

    def leading(self, rank: int) -> tuple[FactoredSVD, float]:
        """Return leading singular directions, all of a product, `rank` ≥ 1 of a dense matrix, and ‖ΔW‖_F of all."""

    def sigma(self) -> Tensor:
        """Return every singular value, descending, those at the rounding as 0: a rank's, or min(rows, columns)."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """ΔW = B·A, with the scaling folded into B (rows, r); A is (r, columns)."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.B), self.A.shape[1]

    def norm2(self) -> float:
        return float(singular_values(self.B, self.A).square().sum())  # where terms cancel, a trace would too

    def terms2(self) -> float:
        return float((self.B.square().sum(0) * self.A.square().sum(1)).sum())

    def inner(self, other: Delta) -> float:
        _check(self, other)
        return float((self.B * other.times(self.A.mT)).sum())

    def onto(self, D: Tensor) -> float:
        return float((self.B * (D @ self.A.mT)).sum())

    def times(self, X: Tensor) -> Tensor:
        return self.B @ (self.A @ X)

    def binned(self, rows: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return _binned(self.B, rows, size), _binned(self.A.mT, columns, size)

    def leading(self, rank: int) -> tuple[FactoredSVD, float]:
        svd = factored_svd(self.B, self.A)
        return svd, math.hypot(*svd.S.tolist())

    def sigma(self) -> Tensor:
        return singular_values(self.B, self.A)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """ΔW as a matrix D. Raises `ValueError` where it holds NaN or infinity."""

    D: Tensor

    def __post_init__(self) -> None:
        if not bool(self.D.isfinite().all()):
            bad = int((~self.D.isfinite()).sum())
            raise ValueError(f"the change {tuple(self.D.shape)} holds {counted(bad, 'NaN or infinite element')}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.D.shape[0], self.D.shape[1]

    def norm2(self) -> float:
        return float(self.D.square().sum())

    def terms2(self) -> float:
        return self.norm2()

    def inner(self, other: Delta) -> float:
        _check(self, other)
        return other.onto(self.D)

    def onto(self, D: Tensor) -> float:
        return float((self.D * D).sum())

    def times(self, X: Tensor) -> Tensor:
        return self.D @ X

    def binned(self, rows: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return torch.eye(size, dtype=self.D.dtype), _binned(_binned(self.D, rows, size).mT, columns, size)

    def leading(self, rank: int) -> tuple[FactoredSVD, float]:
        if min(self.shape) <= _EXACT_SIDE:
            U, S, Vh = torch.linalg.svd(self.D, full_matrices=False)
        else:
            found = truncated_svd(self.D, rank, tolerance=_TOLERANCE)
            U, S, Vh = found.U, found.S, found.Vh
        return FactoredSVD(U[:, :rank], S[:rank], Vh[:rank], self._floor(S)), math.sqrt(self.norm2())

    def sigma(self) -> Tensor:
        if min(self.shape) <= _EXACT_SIDE:
            S: Tensor = torch.linalg.svdvals(self.D)
            return S.masked_fill(S.le(self._floor(S)), 0.0)
        short = self.D if self.shape[0] <= self.shape[1] else self.D.mT
        squares: Tensor = torch.linalg.eigvalsh(short @ short.mT).flip(0)
        return squares.masked_fill(squares.le(_EPS * max(self.shape) * squares[0]), 0.0).sqrt()

    def _floor(self, S: Tensor) -> Tensor:
        floor: Tensor = _EPS * max(self.shape) * S[:1].sum()
        return floor


def _binned(X: Tensor, bins: Tensor, size: int) -> Tensor:
    """Return S·X (size, k), as `Delta.binned` has S."""
    sums = X.new_zeros(2 * size, X.shape[1]).index_add_(0, bins, X.contiguous())
    return sums[:size] - sums[size:]


def _check(one: Delta, other: Delta) -> None:
    if one.shape != other.shape:
        raise ValueError(f"an inner product needs changes of one shape, not {one.shape} and {other.shape}")
