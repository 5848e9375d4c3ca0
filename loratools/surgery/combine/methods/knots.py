"""KnOTS: align the adapters by one SVD, then TIES on their right factors (Stoica et al. 2024, arXiv 2410.19735).

[ΔW₁ | … | ΔW_T] = U·Σ·[V₁ | … | V_T]; the Vᵢ (k, columns), trimmed by `density`, are merged as TIES merges, and the
result is U·Σ·V. Here the SVD is that of the Σr × Σr core of the factors: nothing dense is made, and the result is a
product of rank at most Σr, exactly. Averaging the Vᵢ instead would give the linear sum again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg.factored import factored_svd
from loratools.surgery.combine.methods._signs import disjoint_mean
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Terms

SUMMARY = "TIES on right factors that one SVD has aligned"
OPTIONS = frozenset({"density"})
LIKE = frozenset[str]()


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> tuple[Tensor, Tensor]:
    """Return left = U·Σ (rows, k) and right = TIES of the aligned Vᵢ (k, columns), in float64."""
    diagonal: Tensor = torch.block_diag(*(term.right for term in terms))  # type: ignore[no-untyped-call]
    svd = factored_svd(torch.cat([term.left for term in terms], 1), diagonal)
    k = max(1, int(svd.rank()))
    aligned = torch.stack(svd.Vh[:k].chunk(len(terms), 1))
    return svd.U[:, :k] * svd.S[:k], ties(aligned, terms, options.share)


def ties(X: Tensor, terms: Terms, density: float) -> Tensor:
    """Return TIES of X (T, m, n), a small matrix for each term, of which the share `density` of elements is kept."""
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64, device=X.device)[:, None, None]
    size = X[0].numel()
    kept = int(density * size)
    if kept < 1:
        return torch.zeros_like(X[0])
    # On the host: the cores are small, and CUDA has no fixed order for it.
    cuts = X.abs().flatten(1).cpu().kthvalue(size - kept + 1, 1).values[:, None, None].to(X.device)
    return disjoint_mean(X * (X.abs() >= cuts), weights)
