"""mergekit's definitions of the methods that prune: what is kept has the L1 norm of all, and Σw divides, not counts.

`mergekit.merge_methods.generalized_task_arithmetic` on ΔWᵢ = (base + ΔWᵢ) − base. Its random numbers come from one
stream of torch, ours from seed, adapter and module: the same chances, other draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._signs import disjoint_mean
from loratools.surgery.combine.methods._terms import MethodOptions

Kept = Callable[[Tensor, int], Tensor]
"""Rows of all ΔW and the number of their tile -> the same rows with zeros where elements are dropped."""

_LEAST = 1e-7


def merged(
    deltas: Deltas, kept: Kept, options: MethodOptions, *, elects: bool, normalize: bool, rescale: bool
) -> Tensor:
    """Return Σ wᵢ·cᵢ·xᵢ, with cᵢ = ‖ΔWᵢ‖₁/‖xᵢ‖₁ where it is rescaled; the elected ones over Σw where it is normalized.

    `elects`, `normalize` and `rescale` are the method's own, where the options do not say otherwise. Without an
    election nothing is divided: weights that add up to 1 do the same.
    """
    normalize = normalize if options.normalize is None else options.normalize
    rescale = rescale if options.rescale is None else options.rescale
    scale = _scales(deltas, kept) if rescale and options.share < 1 else torch.ones_like(deltas.weights)

    def combine(X: Tensor, tile: int) -> Tensor:
        left = X if options.share >= 1 else kept(X, tile) * scale
        if elects:
            return disjoint_mean(left, deltas.weights, "mergekit", normalize=normalize)
        return (left * deltas.weights).sum(0)

    return deltas.merged(combine)


def _scales(deltas: Deltas, kept: Kept) -> Tensor:
    """Return the ratio of the L1 norm of each ΔW to that of what is kept, 1 where one of them is almost 0."""
    before = torch.zeros(len(deltas.terms), dtype=torch.float64, device=deltas.device)
    after = torch.zeros_like(before)
    for number, X in enumerate(deltas.tiles()):
        before += X.abs().sum((1, 2), dtype=torch.float64)
        after += kept(X, number).abs().sum((1, 2), dtype=torch.float64)
    ratio = torch.where((before < _LEAST) | (after < _LEAST), 1.0, before / after.clamp_min(_LEAST))
    return ratio.float()[:, None, None]
