"""Sign election and disjoint mean, the second and third step of TIES (arXiv 2306.01708), which other methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def disjoint_mean(X: Tensor, weights: Tensor, like: str | None = None, *, normalize: bool = True) -> Tensor:
    """Return the mean of weighted elements w·x over those whose sign is the elected one; X is (T, …), zeros abstain.

    The elected sign is sgn(Σ w·x), as in the paper, where all weights are equal: the sign with more mass. Where the
    masses cancel exactly nothing is elected and the result is 0. With `like` "peft" it is the sign of Σ x, without the
    weights, and + where the sum is 0 (peft.utils.merge_utils.ties). With "mergekit" it is + where the sum is 0, and the
    weights of those elected divide, or nothing unless `normalize`.
    """
    weighted = X * weights
    if like == "peft":
        elected = torch.where(X.sum(0) >= 0, 1.0, -1.0)
        kept = X.sign() == elected
    else:
        elected = weighted.sum(0).sign()
        kept = (weighted.sign() == elected) & (elected != 0)
    if like == "mergekit":
        kept = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        divisor = (weights * kept).sum(0) if normalize else torch.ones(())
        return (weighted * kept).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    return (weighted * kept).sum(0) / kept.sum(0).clamp_min(1)
