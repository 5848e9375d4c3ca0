"""Products of a large dense matrix with few columns: in C on float32 in the CPU's memory, torch's elsewhere.

Both are right to float32; the C sums in one order whatever the number of threads, and several times faster than torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg.native import delta


def times(D: Tensor, X: Tensor) -> Tensor:
    """Return D·X (m, k); D is (m, n) and X (n, k), of one dtype and device."""
    if _served(D, X):
        if _has_rows(D):
            return torch.from_numpy(delta.times(D.numpy(), X.numpy()))
        if _has_rows(D.T):
            return torch.from_numpy(delta.across(D.T.numpy(), X.numpy()))
    product: Tensor = (X.T @ D.T).T  # faster than D·X where D itself is a transpose, and never slower
    return product


def across(D: Tensor, X: Tensor) -> Tensor:
    """Return Dᵀ·X (n, k); D is (m, n) and X (m, k), of one dtype and device."""
    if _served(D, X):
        if _has_rows(D):
            return torch.from_numpy(delta.across(D.numpy(), X.numpy()))
        if _has_rows(D.T):
            return torch.from_numpy(delta.times(D.T.numpy(), X.numpy()))
    # (XᵀD)ᵀ rather than DᵀX: the product then runs along the rows of D as they lie in memory.
    product: Tensor = (X.T @ D).T
    return product


def gram64(X: Tensor, Y: Tensor) -> Tensor | None:
    """Return XᵀY in float64, X (m, a) and Y (m, b) with few columns in float32; None where torch has to do it."""
    if _served(X, Y) and _has_rows(X) and _has_rows(Y):
        return torch.from_numpy(delta.gram(X.numpy(), Y.numpy()))
    return None


def _served(*matrices: Tensor) -> bool:
    return delta.available() and all(X.dtype == torch.float32 and X.device.type == "cpu" for X in matrices)


def _has_rows(X: Tensor) -> bool:
    return X.stride(1) == 1 or X.shape[1] <= 1
