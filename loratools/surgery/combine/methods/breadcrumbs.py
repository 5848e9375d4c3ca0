"""Model Breadcrumbs: drop each ΔWᵢ's largest and smallest elements, then Σ wᵢ·ΔWᵢ (arXiv 2312.06795).

Of mn elements the ⌊gamma·mn⌋ largest go, then the ⌊density·mn⌋ next largest stay; where there are not so many, fewer of
the largest go. This is mergekit's `breadcrumbs`, with its gamma of 0.01 where none is given.
"""

from __future__ import annotations

from torch import Tensor

from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "drop outliers and small elements, then the weighted sum"
OPTIONS = frozenset({"density", "gamma"})
LIKE = frozenset[str]()

GAMMA = 0.01


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ wᵢ·xᵢ·[low ≤ |xᵢ| < high] with the cuts of each adapter."""
    deltas = Deltas(terms)
    kept = int(options.share * deltas.elements)
    gamma = GAMMA if options.gamma is None else options.gamma
    outliers = min(int(gamma * deltas.elements), deltas.elements - kept)
    high, low = deltas.cuts(outliers, outliers + kept)
    return deltas.merged(lambda X, _: (X * (X.abs() < high) * (X.abs() >= low) * deltas.weights).sum(0))
