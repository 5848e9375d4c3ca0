"""Comparing low-rank updates: subspace similarity and the amplification factor of the LoRA paper (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.linalg.factored import FactoredSVD


def subspace_similarity(V1: Tensor, V2: Tensor) -> Tensor:
    """Return φ(i, j) = ‖V₁[:i]·V₂[:j]ᵀ‖_F²/min(i, j) for all i ≤ k₁ and j ≤ k₂, float64 (k₁, k₂), each in [0, 1].

    V₁ (k₁, n) and V₂ (k₂, n) hold orthonormal rows, leading direction first. Element [i-1, j-1] is φ(i, j) of §7.2 of
    the LoRA paper: 1 when one leading subspace contains the other, 0 when they are orthogonal. Raises ValueError when
    the rows are of unequal length.
    """
    if V1.ndim != 2 or V2.ndim != 2 or V1.shape[1] != V2.shape[1]:
        raise ValueError(f"subspaces of one space are needed, not {tuple(V1.shape)} and {tuple(V2.shape)}")
    overlaps = ((V1.double() @ V2.double().T) ** 2).cumsum(0).cumsum(1)
    i = torch.arange(1, V1.shape[0] + 1, device=V1.device)[:, None]
    j = torch.arange(1, V2.shape[0] + 1, device=V2.device)[None, :]
    return (overlaps / torch.minimum(i, j)).clamp(0, 1)


def principal_angles(V1: Tensor, V2: Tensor) -> Tensor:
    """Return the principal angles between the subspaces of orthonormal rows V₁ (k₁, n) and V₂ (k₂, n), float64.

    min(k₁, k₂) of them, in radians, ascending. cos θ = σ(V₁V₂ᵀ) loses small angles, so those under 45° are found by
    sin θ = σ of what lies outside the larger subspace (Björck & Golub 1973). Raises ValueError for rows of unequal
    length.
    """
    if V1.ndim != 2 or V2.ndim != 2 or V1.shape[1] != V2.shape[1]:
        raise ValueError(f"subspaces of one space are needed, not {tuple(V1.shape)} and {tuple(V2.shape)}")
    small, large = sorted((V1.double(), V2.double()), key=len)
    cosines = torch.linalg.svdvals(small @ large.mT).clamp(0, 1)
    sines = torch.linalg.svdvals(small - (small @ large.mT) @ large).flip(0).clamp(0, 1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def random_directions(rank: int, size: int, seed: int, draw: int = 0) -> Tensor:
    """Return the right singular vectors of a random Gaussian matrix (rank, size), float64, as rows.

    They span a subspace that is uniform among all of its rank, as those of a Gaussian matrix of more rows do.
    `draw` tells several with one seed apart.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) % (1 << 63))
    Vh: Tensor = torch.linalg.svd(
        torch.randn(rank, size, generator=generator, dtype=torch.float64), full_matrices=False
    )[2]
    return Vh


def projected(W: Tensor, U: Tensor, V: Tensor) -> float:
    """Return ‖UᵀWV‖_F for W (rows, columns) and orthonormal columns U (rows, r) and V (columns, r), in float64."""
    return float(torch.linalg.matrix_norm(U.double().mT @ (W.double() @ V.double())))


def amplification(
    update: FactoredSVD, W: Tensor | Callable[[Tensor], Tensor], rank: int | None = None, norm: float | None = None
) -> float:
    """Return the amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F of §7.3 of the LoRA paper.

    U and V are the `rank` leading singular vectors of ΔW (default: all above rounding); `W` is the base weight
    (out, in), or a function that multiplies it by a matrix: (in, r) -> (out, r), for weights that are streamed. The
    factor says how much ΔW strengthens directions that W hardly uses; it is infinite where W has nothing in them.
    `norm` is ‖ΔW‖_F where `update` holds leading directions alone (default: that of its singular values).
    Raises ValueError when ΔW is zero, or `rank` exceeds its true rank.
    """
    true = int(update.rank())
    rank = true if rank is None else rank
    if true == 0:
        raise ValueError("the amplification factor of an update that is zero is not defined")
    if not 1 <= rank <= true:
        raise ValueError(f"the amplification factor was asked at rank {rank}, but the update has rank {true}")
    V = update.Vh[:rank].mT
    WV = W(V) if callable(W) else W.double() @ V
    strength = float(torch.linalg.matrix_norm(update.U[:, :rank].mT @ WV.double()))
    norm = float(torch.linalg.vector_norm(update.S)) if norm is None else norm
    return norm / strength if strength > 0 else float("inf")
