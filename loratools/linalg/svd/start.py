"""Where the iteration for the leading directions of a matrix begins: a random sketch of its rows."""

from __future__ import annotations

from functools import lru_cache
from hashlib import shake_128
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def sketched_start(D: Tensor, block: int, seed: int) -> Tensor:
    """Return an orthonormal basis (n, k), k ≤ `block`, of the columns of Dᵀ·S, S (m, block) random.

    S is drawn on the CPU, the same for every device and thread. To begin with DᵀS instead of random columns
    saves a product and a block: the columns already lean towards the leading directions.
    """
    import torch

    from loratools.linalg.orthonormal import orthonormal_columns
    from loratools.linalg.products import across

    dtype = torch.float32 if D.dtype == torch.bfloat16 else D.dtype
    S = torch.from_numpy(random_columns(D.shape[0], min(block, D.shape[1]), seed))
    return orthonormal_columns(across(D, S.to(D.device, dtype)))


@lru_cache(maxsize=8)
def random_columns(rows: int, columns: int, seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Return S, even over (-1, 1), from the bits of SHAKE-128 of seed and shape: the same everywhere and always.

    Most layers of a model have one of a few shapes.
    """
    stream = shake_128(f"loratools.svd.v1\0{seed}\0{rows}\0{columns}".encode()).digest(2 * rows * columns)
    return ((np.frombuffer(stream, "<i2").astype(np.float32) + 0.5) / 32768).reshape(rows, columns)
