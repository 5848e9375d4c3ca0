"""The factors that training starts from: B·A = 0 (LoRA), or the principal part of W, which is taken off again.

    kaiming    A ~ U(−1/√in, 1/√in), B = 0: loralib's and PEFT's default
    gaussian   A ~ N(0, 1/r²), B = 0: the Gaussian start of the paper, with PEFT's deviation 1/r
    pissa      A = √S·Vᵀ and B = U·√S over s, of the r largest singular values of W (Meng et al. 2024, arXiv 2404.02948)
    olora      A and B from the first r columns of Q and rows of R, W = Q·R (Büyükakyüz 2024, arXiv 2406.01775)

With the last two PEFT subtracts s·B₀·A₀ from the weight. Here the weight stays as it is and the product of the first
factors is subtracted in the forward: y = W·x + s·(B·A − B₀·A₀)·x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
"""How A and B start."""

Factors = tuple[Tensor, Tensor]


def _kaiming(A: Tensor, generator: torch.Generator) -> None:
    bound = A[0].numel() ** -0.5
    A.uniform_(-bound, bound, generator=generator)


def _gaussian(A: Tensor, generator: torch.Generator) -> None:
    A.normal_(0, 1 / len(A), generator=generator)


RANDOM: Mapping[str, Callable[[Tensor, torch.Generator], None]] = {"kaiming": _kaiming, "gaussian": _gaussian}
"""How A is drawn in place, (r, in, …); B is zero."""


def _pissa(W: Tensor, rank: int, scaling: float, seed: int) -> Factors:
    from loratools.linalg.svd.truncated import truncated_svd

    B, A = truncated_svd(W, rank, seed=seed).factors()
    return A * scaling**-0.5, B * scaling**-0.5


def _olora(W: Tensor, rank: int, scaling: float, seed: int) -> Factors:
    Q, R = torch.linalg.qr(W)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


OF_WEIGHT: Mapping[str, Callable[[Tensor, int, float, int], Factors]] = {"pissa": _pissa, "olora": _olora}
"""How A (r, in) and B (out, r) are made of W (out, in) in float32, the rank, the scaling s and the seed; as in PEFT,
s·B·A is the principal part of W with pissa, and s times the first columns and rows of Q·R with olora."""


def of_weight(W: Tensor, rank: int, scaling: float, init: str, seed: int) -> Factors:
    """Return (A, B) in float32, made of W (out, in) as `init` says.

    Where W has fewer rows or columns than `rank`, zeros fill them up.
    """
    wide = W.detach().float()
    A, B = OF_WEIGHT[init](wide, min(rank, *wide.shape), scaling, seed)
    if missing := rank - len(A):
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        B = torch.cat([B, B.new_zeros(len(B), missing)], 1)
    return A.to(W.device), B.to(W.device)


def trained(rank: int, alpha: float, rslora: bool) -> float:
    """Return the scaling s = α/r, or α/√r with rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
