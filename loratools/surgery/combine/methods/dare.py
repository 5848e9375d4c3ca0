"""DARE: drop elements at random, rescale the rest by 1/density, then Σ wᵢ·ΔWᵢ (Yu et al. 2023, arXiv 2311.03099).

The paper's drop rate p is 1 − density. `like` "mergekit" matches the L1 norm instead; PEFT draws from one unseeded
stream: `like` "peft" draws as it does after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "drop elements at random and rescale, then the weighted sum"
OPTIONS = frozenset({"density", "seed"})
LIKE = frozenset({"peft", "mergekit"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ wᵢ·xᵢ·mᵢ/density with random masks m."""
    deltas, density = Deltas(terms, whole=options.like == "peft"), options.share
    if options.like == "mergekit":
        kept = drawn(terms, density, chance)
        return _mergekit.merged(deltas, kept, options, elects=False, normalize=False, rescale=True)
    return deltas.merged(lambda X, tile: (dropped(X, terms, density, chance, tile) * deltas.weights).sum(0))


def dropped(X: Tensor, terms: Terms, density: float, chance: Chance, tile: int) -> Tensor:
    """Return X·m/density, (T, rows, columns)."""
    if density == 1:
        return X
    probability = torch.full(X.shape[1:], density, device=X.device)
    return X * torch.stack([chance.keep(term, tile, probability) for term in terms]) / density


def drawn(terms: Terms, density: float, chance: Chance) -> _mergekit.Kept:
    """Return what drops elements of all ΔW with chance 1 − density, and leaves the others as they are."""

    def kept(X: Tensor, tile: int) -> Tensor:
        probability = torch.full(X.shape[1:], density, device=X.device)
        return X * torch.stack([chance.keep(term, tile, probability) for term in terms])

    return kept
