"""Core Space: bring the adapters into one small common space and merge there by TIES (arXiv 2509.17786).

With orthonormal U of [left₁ | …] and V of [right₁; …], each change is U·Mᵢ·Vᵀ without loss, Mᵢ of Σr × Σr; the Mᵢ,
trimmed by `density`, are merged as TIES merges, and the result is U·M·Vᵀ. The bases are the singular vectors of the
stacked factors, balanced, so that the result does not depend on how a factor is scaled against its partner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg.factored import factored_svd
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Term, Terms
from loratools.surgery.combine.methods.knots import ties

SUMMARY = "TIES on the small cores of the adapters in a common space"
OPTIONS = frozenset({"density"})
LIKE = frozenset[str]()


def merge(terms: Terms, options: MethodOptions, chance: Chance) -> tuple[Tensor, Tensor]:
    """Return left = U (rows, k) and right = M·Vᵀ (k, columns), in float64."""
    balanced = [_balanced(term) for term in terms]
    U = _basis(torch.cat([left for left, _ in balanced], 1))
    V = _basis(torch.cat([right.T for _, right in balanced], 1))
    cores = torch.stack([(U.T @ term.left) @ (term.right @ V) for term in terms])
    return U, ties(cores, terms, options.share) @ V.T


def _balanced(term: Term) -> tuple[Tensor, Tensor]:
    svd = factored_svd(term.left, term.right)
    left, right, _ = svd.truncated(max(1, int(svd.rank())))
    return left, right


def _basis(stacked: Tensor) -> Tensor:
    """Return the left singular vectors of stacked factors, leading first, without those of rounding."""
    if not stacked.is_cpu:  # the long side stays on the device, what is decomposed is small
        Q, R = torch.linalg.qr(stacked)
        whole: Tensor = Q @ _basis_of(R.cpu(), max(stacked.shape)).to(Q.device)
        return whole
    return _basis_of(stacked, max(stacked.shape))


def _basis_of(stacked: Tensor, side: int) -> Tensor:
    U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
    kept = int(S.gt(S[:1] * side * torch.finfo(torch.float64).eps).sum())
    basis: Tensor = U[:, : max(1, kept)]
    return basis
