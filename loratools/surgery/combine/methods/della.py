"""DELLA: drop at random, small elements more often; elect signs and average (Deep et al. 2024, arXiv 2406.11617).

Within each row, the chance of keeping an element grows evenly with the rank of its magnitude, from density − epsilon to
density + epsilon, and what is kept is divided by its chance. The paper's ε is the whole width, twice ours; mergekit has
our epsilon, but rescales to the L1 norm, and divides by the sum of the weights: `like` "mergekit".
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import LoraToolsError
from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._signs import disjoint_mean
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "drop small elements more often than large ones and rescale, then elect sign and average"
OPTIONS = frozenset({"density", "epsilon", "seed"})
LIKE = frozenset({"mergekit"})

EPSILON = 0.15
"""Taken where none is given, as in mergekit; less where the density leaves less."""


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return the disjoint mean of x·m/p with P(m) = p. Raises `LoraToolsError` where p would leave (0, 1]."""
    deltas, kept = Deltas(terms), drawn(terms, options, chance)
    if options.like == "mergekit":
        return _mergekit.merged(deltas, kept, options, elects=True, normalize=True, rescale=True)
    return deltas.merged(lambda X, tile: disjoint_mean(kept(X, tile), deltas.weights))


def drawn(terms: Terms, options: MethodOptions, chance: Chance) -> _mergekit.Kept:
    """Return what gives x·m/p of all ΔW with P(m) = p, or x·m where mergekit rescales later.

    Raises `LoraToolsError` where a chance p would leave (0, 1].
    """
    density = options.share
    epsilon = min(EPSILON, density / 2, 1 - density) if options.epsilon is None else options.epsilon
    if not (0 <= epsilon < density and density + epsilon <= 1):
        raise LoraToolsError(f"della: density {density:g} ± epsilon {epsilon:g} is no range of probabilities")

    def kept(X: Tensor, tile: int) -> Tensor:
        p = probabilities(X, density, epsilon)
        masks = torch.stack([chance.keep(term, tile, own) for term, own in zip(terms, p, strict=True)])
        return X * masks if options.like == "mergekit" else X * masks / p

    return kept


def probabilities(X: Tensor, density: float, epsilon: float) -> Tensor:
    """Return density + epsilon·(2·(rank − 1)/(n − 1) − 1), the rank of |x| within its row of n counted from 1."""
    width = X.shape[-1]
    chances = torch.linspace(density - epsilon, density + epsilon, width, device=X.device).expand(X.shape)
    return torch.empty_like(X).scatter_(-1, X.abs().argsort(dim=-1, stable=True), chances)
