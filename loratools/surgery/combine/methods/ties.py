"""TIES: trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708).

Trim keeps the share `density` of largest elements of each ΔWᵢ (the paper takes 0.2); the sign with more mass is elected
for each element, and the trimmed elements of that sign are averaged. The paper has one λ for all adapters; here each
has its weight from the election on, as in mergekit. PEFT elects without the weights: `like` "peft".
`like` "mergekit" divides by the sum of their weights.
"""

from __future__ import annotations

from torch import Tensor

from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._signs import disjoint_mean
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "trim, elect sign, disjoint mean"
OPTIONS = frozenset({"density"})
LIKE = frozenset({"peft", "mergekit"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return the disjoint mean of the trimmed changes."""
    deltas = Deltas(terms)
    least = options.like == "mergekit"  # which keeps one element at least
    (cuts,) = deltas.cuts(max(least, int(options.share * deltas.elements)))
    if options.like == "mergekit":
        return _mergekit.merged(
            deltas, lambda X, _: X * (X.abs() >= cuts), options, elects=True, normalize=True, rescale=False
        )
    return deltas.merged(lambda X, _: disjoint_mean(X * (X.abs() >= cuts), deltas.weights, options.like))
