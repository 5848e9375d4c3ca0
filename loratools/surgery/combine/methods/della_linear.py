"""DELLA without its election: drop at random, small elements more often, then Σ wᵢ·ΔWᵢ (mergekit has it too)."""

from __future__ import annotations

from torch import Tensor

from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms
from loratools.surgery.combine.methods.della import drawn

SUMMARY = "drop small elements more often than large ones and rescale, then the weighted sum"
OPTIONS = frozenset({"density", "epsilon", "seed"})
LIKE = frozenset({"mergekit"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ wᵢ·xᵢ·mᵢ/pᵢ with P(m) = p. Raises `LoraToolsError` where p would leave (0, 1]."""
    deltas, kept = Deltas(terms), drawn(terms, options, chance)
    if options.like == "mergekit":
        return _mergekit.merged(deltas, kept, options, elects=False, normalize=False, rescale=True)
    return deltas.merged(lambda X, tile: (kept(X, tile) * deltas.weights).sum(0))
