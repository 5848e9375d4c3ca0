"""A few changed rows of an embedding as exact factors: A selects the tokens, B holds what is added to them.

ΔW (V, d) with n rows that are not zero is (B·A)ᵀ with A (n, V) of zeros and ones and B (d, n): exact at rank n, and of
n·(V + d) numbers where the whole embedding has V·d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.storage import files
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta, common_dtype, one_of

MOST = 64
"""Rows: beyond these the selection costs more than it is worth, and the embedding is saved whole."""


def is_sparse(pair: Pair, delta: Delta, shape: tuple[int, ...]) -> bool:
    """Tell whether a changed embedding, which nobody asked to save whole, is worth saving row by row."""
    return pair.sparse and 0 < len(delta.rows) <= min(MOST, shape[0] // 4)


def row_factors(base: TensorSpec, tuned: TensorSpec, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (d, n) and A (n, V) of the rows that changed, float32 (float64 where one of the two is)."""
    wide = common_dtype(base, tuned)
    old, new = ([files.read_tensor(one_of(spec, row)).to(wide) for row in rows] for spec in (base, tuned))
    A = torch.zeros(len(rows), tuned.shape[0], dtype=wide)
    A[torch.arange(len(rows)), torch.tensor(rows)] = 1
    return torch.stack(new, 1) - torch.stack(old, 1), A
