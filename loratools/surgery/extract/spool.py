"""Factors on disk while an extraction runs: memory stays that of a few tensors, however large the adapter becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.storage import dtypes, files, save
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


@dataclass(frozen=True, slots=True)
class Spooled:
    """Factors B (out, R) and A (R, in) of one layer, in a file."""

    B: TensorSpec
    A: TensorSpec

    @property
    def rank(self) -> int:
        """Return R."""
        return self.A.shape[0]

    def load(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B (out, rank) and A (rank, in), contiguous."""
        return files.read_tensor(self.B)[:, :rank].contiguous(), files.read_tensor(self.A)[:rank].contiguous()

    def lazy(self, rank: int, dtype: str) -> tuple[LazyTensor, LazyTensor]:
        """Return (B, A) of the leading `rank`, rounded to `dtype` when they are loaded."""
        if rank == self.rank and dtype == self.A.dtype:
            return LazyTensor.stored(self.B), LazyTensor.stored(self.A)
        wanted = dtypes.to_torch(dtype)
        return (
            LazyTensor(dtype, (self.B.shape[0], rank), lambda: self.load(rank)[0].to(wanted)),
            LazyTensor(dtype, (rank, self.A.shape[1]), lambda: self.load(rank)[1].to(wanted)),
        )


class Spool(save.Spool):
    """A file that threads append factors to."""

    def add(self, B: Array, A: Array) -> Spooled:
        """Write the factors of one layer, in float32 or float64."""
        return Spooled(self._array(B), self._array(A))

    def _array(self, array: Array) -> TensorSpec:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return self.append(_NAMES[array.dtype], array.shape, raw)
