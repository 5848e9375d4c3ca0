"""Where the iteration for the leading directions of a matrix begins: a random sketch of its rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from loratools.linalg.orthonormal import orthonormal_columns
from loratools.linalg.products import across


def sketched_start(D: Tensor, block: int, seed: int) -> Tensor:
    """Return an orthonormal basis (n, k), k ≤ `block`, of the columns of Dᵀ·Sᵀ, S (block, m) Gaussian.

    S is drawn on the CPU, the same for every device and thread. To begin with DᵀSᵀ instead of random columns
    saves a product and a block: the columns already lean towards the leading directions.
    """
    dtype = torch.float32 if D.dtype == torch.bfloat16 else D.dtype
    S = _gaussian(min(block, D.shape[1]), D.shape[0], seed, dtype).to(D.device)
    return orthonormal_columns(across(D, S.T))


@lru_cache(maxsize=4)
def _gaussian(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return S; most layers of a model have one of a few shapes."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
