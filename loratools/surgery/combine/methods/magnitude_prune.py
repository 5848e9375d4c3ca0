"""Magnitude pruning: of each ΔWᵢ the share `density` of largest elements is kept, then Σ wᵢ·ΔWᵢ. PEFT's definition."""

from __future__ import annotations

from torch import Tensor

from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "each adapter's largest elements only, then the weighted sum"
OPTIONS = frozenset({"density"})
LIKE = frozenset({"peft"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ wᵢ·xᵢ·[|xᵢ| ≥ tᵢ], tᵢ the magnitude of element number ⌊density·mn⌋; elements equal to it all stay."""
    deltas = Deltas(terms)
    (cuts,) = deltas.cuts(int(options.share * deltas.elements))
    return deltas.merged(lambda X, _: (X * (X.abs() >= cuts) * deltas.weights).sum(0))
