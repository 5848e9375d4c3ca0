"""DARE-TIES: drop at random and rescale as DARE does, then elect signs and average as TIES does (arXiv 2311.03099)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from loratools.surgery.combine.methods import _mergekit
from loratools.surgery.combine.methods._deltas import Deltas
from loratools.surgery.combine.methods._signs import disjoint_mean
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms
from loratools.surgery.combine.methods.dare import drawn, dropped

SUMMARY = "drop elements at random and rescale, then elect sign and average"
OPTIONS = frozenset({"density", "seed"})
LIKE = frozenset({"peft", "mergekit"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return the disjoint mean of the changes that are left."""
    deltas, density = Deltas(terms, whole=options.like == "peft"), options.share
    if options.like == "mergekit":
        kept = drawn(terms, density, chance)
        return _mergekit.merged(deltas, kept, options, elects=True, normalize=False, rescale=True)
    combine = partial(disjoint_mean, weights=deltas.weights, like=options.like)
    return deltas.merged(lambda X, tile: combine(dropped(X, terms, density, chance, tile)))
