"""A few changed rows of an embedding as exact factors: A selects the tokens, B holds what is added to them.

ΔW (V, d) with n rows that are not zero is (B·A)ᵀ with A (n, V) of zeros and ones and B (d, n): exact at rank n, and of
n·(V + d) numbers where the whole embedding has V·d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.storage import files
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta

if TYPE_CHECKING:
    import torch

MOST = 64
"""Rows: beyond these the selection costs more than it is worth, and the embedding is saved whole."""


def is_sparse(pair: Pair, delta: Delta, shape: tuple[int, ...]) -> bool:
    """Tell whether a changed embedding, which nobody asked to save whole, is worth saving row by row."""
    return pair.sparse and 0 < len(delta.rows) <= min(MOST, shape[0] // 4)


def row_factors(base: TensorSpec, tuned: TensorSpec, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (d, n) and A (n, V) of the rows that changed, float32 (float64 where one of the two is)."""
    import torch

    wide = torch.float64 if "F64" in (base.dtype, tuned.dtype) else torch.float32
    added = [files.read_tensor(_row(tuned, row)).to(wide) - files.read_tensor(_row(base, row)).to(wide) for row in rows]
    A = torch.zeros(len(rows), tuned.shape[0], dtype=wide)
    A[torch.arange(len(rows)), torch.tensor(rows)] = 1
    return torch.stack(added, 1), A


def _row(spec: TensorSpec, row: int) -> TensorSpec:
    size = spec.nbytes // spec.shape[0]
    return TensorSpec(spec.dtype, spec.shape[1:], spec.file, spec.start + row * size, spec.start + (row + 1) * size)
