"""How far from the optimum a truncated decomposition can be: bounds that need no knowledge of the spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loratools.linalg.orthonormal import extend, gram
from loratools.linalg.svd.basis import SUMS
from loratools.linalg.svd.krylov import Krylov

# Eight Gaussian probes all miss the leading direction (component below 0.1) with probability (0.2/√(2π))⁸ = 1.6e-9.
_PROBES, _COMPONENT, _DEPTH = 8, 0.1, 5
# Units of D's dtype that the factors are off, relative to ‖D‖_F: each of the two is rounded to half a unit.
_ROUNDING = 1.0


def excess_bound(
    basis: Krylov, rank: int, norm2: float, *, probe: bool, seed: int, unseen: float | None = None
) -> float:
    """Return an upper bound on Σ_{i≤r} σᵢ(D)² - Σ_{i≤r} θᵢ: what an optimal rank-r part captures beyond ours.

    With E = D·(I - VVᵀ), what the basis has not seen: DDᵀ = (DV)(DV)ᵀ + EEᵀ, so the excess is ≤ ‖E‖_F² = ‖D‖² - Σ θ
    (Ky Fan); that certain but loose bound is returned without `probe`. With it: DᵀD is [[Θ, Fᵀ], [F, H]] in the basis
    [V, V⊥], H ≤ η = ‖E‖₂², and for every γ > 0 it lies below [[Θ + FᵀF/γ, 0], [0, H + γ]]. So the excess is at most
    top_r(θ ∪ {η + γ}) - top_r(θ) + Σ_{i≤r} λᵢ(FᵀF)/γ; the best γ of a grid is taken. F is read off the last block
    exactly, η comes from `spectral_norm2` and holds with probability 1 - 1.6e-9. `unseen` is ‖E‖_F² where it is known
    better than as that difference. To every bound comes what rounding V and the factors to D's dtype can cost.
    """
    theta = basis.spectrum()
    rounding = (_ROUNDING * torch.finfo(basis.D.dtype).eps) ** 2 * norm2
    if basis.width >= min(basis.D.shape):
        return rounding
    unseen = max(norm2 - float(theta.sum()), 0.0) if unseen is None else unseen
    if not probe or unseen == 0:
        return unseen + rounding
    W, Q = basis.residual()
    R = gram(Q, basis.parts[-1])
    for _ in range(2):
        W = W - basis.V @ (basis.V.T @ W)
    X = W.double()
    coupling = torch.linalg.eigvalsh(R.T @ (X.T @ X).cpu() @ R).flip(0)[:rank].clamp_min(0).sum()
    eta = min(unseen, spectral_norm2(basis.D, basis.V, seed=seed + 1))
    lowest, highest = float(theta[rank - 1]), float(theta[0])
    grid = [lowest * 10 ** (step / 8) for step in range(-40, 41)] + [max(lowest - eta, 0.0)]
    best = unseen
    for gamma in grid:
        if 0 < gamma <= highest:
            rivals = torch.cat([theta, theta.new_full((rank,), eta + gamma)]).sort(descending=True).values
            gained = float(rivals[:rank].sum() - theta[:rank].sum())
            best = min(best, gained + float(coupling) / gamma)
    return best + rounding


def energy_beyond(basis: Krylov, rank: int, lost2: float) -> float:
    """Return what a basis of products in bfloat16 proves of D beyond its `rank` leading directions: a lower bound.

    On Σ_{i>r} σᵢ(D·P)², P the projector on the vectors Ṽ that were multiplied, V rounded. With N = ṼᵀṼ the squared
    singular values of low·P are ≥ θ/λ₁(N) (Ostrowski); D is `lost2` = ‖D − low‖² away from low, and the distance to
    the nearest matrix of rank r changes by no more than that. 0 where Y was turned since.
    """
    if basis.restarted:
        return 0.0
    multiplied = basis.V.to(torch.bfloat16).to(basis.V.dtype)
    largest = float(gram(multiplied, multiplied).abs().sum(1).max())  # ≥ λ₁(N), by Gershgorin
    beyond = math.sqrt(float(basis.spectrum()[rank:].sum()) / largest) - math.sqrt(lost2)
    return (1 - SUMS) * max(beyond, 0.0) ** 2


def spectral_norm2(D: Tensor, V: Tensor, *, seed: int) -> float:
    """Return an upper bound on ‖D·(I - VVᵀ)‖₂², true with probability 1 - 1.6e-9; V (n, k) is orthonormal.

    Block Lanczos of depth k = 5 from Gaussian probes finds ξ ≤ λ₁. A probe ω at angle φ to the leading eigenvector
    gives λ₁ ≤ ξ·cosh²(asinh(tan φ)/(2k - 1)): Chebyshev's T_{2k-1} in the proof of Kuczyński & Woźniakowski 1992,
    solved for λ₁. For n = 4096 the factor is 1.8.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(D.shape[1], _PROBES, generator=generator, dtype=torch.float64)
    tangent = float(torch.linalg.vector_norm(probes, dim=0).max()) / _COMPONENT
    start = extend(V, probes.to(D.dtype).to(D.device))
    if start.shape[1] == 0:
        return 0.0
    basis = Krylov(D, start, deflated=V)
    for _ in range(_DEPTH - 1):
        if not basis.step():
            break
    return float(basis.spectrum()[0]) * math.cosh(math.asinh(tangent) / (2 * _DEPTH - 1)) ** 2
