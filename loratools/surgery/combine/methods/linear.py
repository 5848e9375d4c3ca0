"""The weighted sum Σ wᵢ·ΔWᵢ, exactly, in factor space: task arithmetic (arXiv 2212.04089), with negation by wᵢ < 0.

This is PEFT's `svd` and `cat`. PEFT's `linear` sums A and B apart, (Σ √wᵢBᵢ)(Σ √wⱼAⱼ), and so adds BᵢAⱼ of different
adapters; kohya's `merge_lora` does the same. That is not done here.

There is nothing to merge: factors stand side by side, at rank Σrᵢ (`linalg.stacks.side_by_side`).
"""

from __future__ import annotations

SUMMARY = "the weighted sum, exact; negative weights take an adapter away (task arithmetic)"
OPTIONS = frozenset[str]()
LIKE = frozenset({"peft"})
merge = None
