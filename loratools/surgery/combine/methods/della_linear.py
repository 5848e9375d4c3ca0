"""DELLA without its election: drop at random, small elements more often, then Σ wᵢ·ΔWᵢ (mergekit has it too)."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms
from loratools.surgery.combine.methods.della import chances_of, drawn

SUMMARY = "drop small elements more often than large ones and rescale, then the weighted sum"
OPTIONS = frozenset({"density", "epsilon", "seed"})
LIKE = frozenset({"mergekit"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ wᵢ·xᵢ·mᵢ/pᵢ with P(m) = p. Raises `LoraToolsError` where p would leave (0, 1]."""
    deltas, chances = Deltas(terms), chances_of(options)
    if options.like == "mergekit":
        kept = drawn(terms, chances, chance)
        return _mergekit.merged(deltas, kept, options, elects=False, normalize=False, rescale=True)

    def combine(X: Tensor, tile: int) -> Tensor:
        p = chances(X)
        masks = torch.stack([chance.keep(term, tile, own) for term, own in zip(terms, p, strict=True)])
        return (X * masks / p * deltas.weights).sum(0)

    return deltas.merged(combine)
