"""DELLA: drop at random, small elements more often; elect signs and average (Deep et al. 2024, arXiv 2406.11617).

Within each row, the chance of keeping an element grows evenly with the rank of its magnitude, from density − epsilon to
density + epsilon, and what is kept is divided by its chance. The paper's ε is the whole width, twice ours; mergekit has
our epsilon, but rescales to the L1 norm, and divides by the sum of the weights: `like` "mergekit".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    deltas, chances = Deltas(terms), chances_of(options)
    if options.like == "mergekit":
        kept = drawn(terms, chances, chance)
        return _mergekit.merged(deltas, kept, options, elects=True, normalize=True, rescale=True)

    def combine(X: Tensor, tile: int) -> Tensor:
        p = chances(X)
        masks = torch.stack([chance.keep(term, tile, own) for term, own in zip(terms, p, strict=True)])
        return disjoint_mean(X * masks / p, deltas.weights)

    return deltas.merged(combine)


def chances_of(options: MethodOptions) -> Callable[[Tensor], Tensor]:
    """Return what gives each element its chance; raise `LoraToolsError` where one would leave (0, 1]."""
    density = options.share
    epsilon = min(EPSILON, density / 2, 1 - density) if options.epsilon is None else options.epsilon
    if not (0 <= epsilon < density and density + epsilon <= 1):
        raise LoraToolsError(f"della: density {density:g} ± epsilon {epsilon:g} is no range of probabilities")
    return partial(probabilities, density=density, epsilon=epsilon)


def drawn(terms: Terms, chances: Callable[[Tensor], Tensor], chance: Chance) -> _mergekit.Kept:
    """Return what drops elements of all ΔW by their chances, and leaves the others as they are."""

    def kept(X: Tensor, tile: int) -> Tensor:
        masks = [chance.keep(term, tile, own) for term, own in zip(terms, chances(X), strict=True)]
        return X * torch.stack(masks)

    return kept


def probabilities(X: Tensor, density: float, epsilon: float) -> Tensor:
    """Return density + epsilon·(2·(rank − 1)/(n − 1) − 1), the rank of |x| within its row of n counted from 1."""
    width = X.shape[-1]
    chances = torch.linspace(density - epsilon, density + epsilon, width).expand(X.shape)
    return torch.empty_like(X).scatter_(-1, X.abs().argsort(dim=-1, stable=True), chances)
