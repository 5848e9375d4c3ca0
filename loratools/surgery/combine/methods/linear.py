"""The weighted sum Σ wᵢ·ΔWᵢ, exactly, in factor space: task arithmetic (arXiv 2212.04089), with negation by wᵢ < 0.

This is PEFT's `svd` and `cat`. PEFT's `linear` sums A and B apart, (Σ √wᵢBᵢ)(Σ √wⱼAⱼ), and so adds BᵢAⱼ of different
adapters; kohya's `merge_lora` does the same. That is not done here.
"""

from __future__ import annotations

from torch import Tensor

from loratools.linalg.factored import concatenate
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "the weighted sum, exact; negative weights take an adapter away (task arithmetic)"
OPTIONS = frozenset[str]()
LIKE = frozenset({"peft"})


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> tuple[Tensor, Tensor]:
    """Return factors of Σ wᵢ·leftᵢ·rightᵢ at rank Σrᵢ."""
    return concatenate([(term.weight, term.left, term.right) for term in terms])
