"""SHiRA: ΔW is zero but for single elements, ΔW[iₖ, jₖ] = vₖ, as PEFT stores it.

`shira_weight` (n,) has the numbers v and `shira_indices` (2, n) their rows and columns; on Windows PEFT writes them as
floating point. There is no rank and no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._rowwise import Named
from loratools.adapter.kinds._sparse import Sparse
from loratools.storage.lazy import LazyTensor

VALUES, INDICES = "shira_weight", "shira_indices"


@dataclass(frozen=True, slots=True, eq=False)
class ShiraUpdate(Named):
    """The numbers and their places. Raises `ValueError` where there are not as many of one as of the other."""

    kind = "shira"
    rank = 0

    def __post_init__(self) -> None:
        values, indices = self.tensors[VALUES].shape, self.tensors[INDICES].shape
        if len(values) != 1 or indices != (2, *values):
            raise ValueError(f"{INDICES} has shape {indices}, expected (2, n) for {VALUES} {values}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's once it is known, until then as many rows and columns as the places need."""
        if self.weight_shape:
            return self.weight_shape
        rows, columns = self._places()
        return int(rows.max()) + 1, int(columns.max()) + 1

    @property
    def unsettled(self) -> str:
        return "" if self.weight_shape else "the shape of its weight"

    def fitted(self, shape: tuple[int, ...]) -> ShiraUpdate:
        """Return the update of a base weight of this shape, which the places alone do not tell."""
        if len(shape) != 2:
            raise ValueError(f"it changes elements of a matrix, the base's weight has shape {shape}")
        return ShiraUpdate(self.tensors, self.scaling, self.alpha, shape)

    def _places(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.tensors[INDICES].load().long()
        return rows, columns

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows with the numbers in them."""
        out, inner = self.shape
        values = self.tensors[VALUES].load().to(device, dtype)
        sparse = Sparse.of(self._places(), values, (out, inner))
        return (sparse.transposed() if transposed else sparse).tile

    def dense(self) -> Tensor:
        """Return the sparse matrix that torch makes of numbers and places."""
        import torch

        values = self.tensors[VALUES].load().double()
        places = torch.stack(self._places())
        return torch.sparse_coo_tensor(places, values, self.shape, check_invariants=True).to_dense()


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are numbers and places."""
    return parts.keys() == {VALUES, INDICES}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> ShiraUpdate:
    """Return the update; PEFT's scaling of it is always 1."""
    return ShiraUpdate(dict(parts), 1.0, 1.0)
