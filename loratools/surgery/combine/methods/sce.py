"""SCE: select elements that differ, calculate coefficients, erase minority signs (Wan et al. 2024, arXiv 2408.07990).

Of the elements whose variance over the adapters is not zero the share `density` with the largest is selected; adapter i
counts by cᵢ = mean x̂ᵢ²/Σⱼ mean x̂ⱼ² of what was selected; where signs disagree with sgn(Σ x̂) elements are erased, and
the rest is averaged with the coefficients. As the authors' code and mergekit compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import LoraToolsError
from loratools.surgery.combine.methods._deltas import Deltas, largest
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "select what differs most, weigh by energy, erase minority signs; takes no weights"
OPTIONS = frozenset({"density"})
LIKE = frozenset[str]()


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> Tensor:
    """Return Σ cᵢx̂ᵢ/Σ cᵢ over the adapters of the elected sign. Raises `LoraToolsError` for weights other than 1."""
    if any(term.weight != 1 for term in terms):
        raise LoraToolsError("method sce works out the weights itself; leave them out")
    deltas = Deltas(terms)
    differing = sum(int(torch.count_nonzero(_variance(X))) for X in deltas.tiles())
    (cut,) = largest(lambda: map(_variance, deltas.tiles()), [int(options.share * differing)])

    def selected(X: Tensor) -> Tensor:
        # A density of 1 selects nothing away; equal elements have no variance but are kept then, as mergekit does.
        return X if options.share == 1 else X * (_variance(X) >= cut)

    energy = torch.stack([selected(X).double().square().sum((1, 2)) for X in deltas.tiles()]).sum(0)
    coefficients = (energy / energy.sum() if float(energy.sum()) > 0 else torch.ones_like(energy)).float()

    def combine(X: Tensor, _: int) -> Tensor:
        X = selected(X)
        elected = torch.where(X.sum(0) >= 0, 1.0, -1.0)
        counted = coefficients[:, None, None] * (X.sign() == elected)
        return (X * counted).sum(0) / counted.sum(0).clamp_min(1e-6)

    return deltas.merged(combine)


def _variance(X: Tensor) -> Tensor:
    return (X - X.mean(0)).square_().mean(0)
