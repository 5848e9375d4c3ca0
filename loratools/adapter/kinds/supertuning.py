"""Super-Tuning: ΔW is zero but for single elements, and "Supra" adds a product (arXiv 2607.09287), as in PEFT.

ΔW[iₖ // in, iₖ mod in] = vₖ with `supertuning_values` v (n,) and `supertuning_indices` i (n,), to which (α/r)·B·A of
`supertuning_lora_A.weight` (r, in) and `supertuning_lora_B.weight` (out, r) is added where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Rows, Tensor, Update
from loratools.adapter.kinds._rowwise import Named
from loratools.adapter.kinds._sparse import Sparse
from loratools.storage.lazy import LazyTensor

VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@dataclass(frozen=True, slots=True, eq=False)
class SupertuningUpdate(Named):
    """Single elements, and factors or none. Raises `ValueError` where they do not go together."""

    kind = "supertuning"

    def __post_init__(self) -> None:
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        factors = [shapes[name] for name in (A, B) if name in shapes]
        fits = len(shapes[VALUES]) == 1 and shapes[INDICES] == shapes[VALUES]
        if not fits or any(len(shape) != 2 for shape in factors) or (factors and factors[0][0] != factors[1][1]):
            raise ValueError(f"Super-Tuning's tensors do not go together: {shapes}")
        if factors and self.weight_shape not in (None, (factors[1][0], factors[0][1])):
            raise ValueError(f"its factors are {factors}, the base's weight has shape {self.weight_shape}")

    @property
    def rank(self) -> int:
        """The rank of the factors; 0 where there are none."""
        return self.tensors[A].shape[0] if A in self.tensors else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's once it is known, or that of the factors; indices alone tell neither side."""
        if self.weight_shape or A not in self.tensors:
            return self.weight_shape or (1, self.tensors[VALUES].shape[0])
        return self.tensors[B].shape[0], self.tensors[A].shape[1]

    @property
    def unsettled(self) -> str:
        return "" if self.weight_shape or A in self.tensors else "the shape of its weight"

    def fitted(self, shape: tuple[int, ...]) -> SupertuningUpdate:
        """Return the update of a base weight of this shape."""
        return SupertuningUpdate(self.tensors, self.scaling, self.alpha, shape)

    def weighted(self, weight: float) -> Update | None:
        """Return None: the values beside the product do not follow the scaling."""
        return None

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.tensors[B].load().double(), self.tensors[A].load().double()

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows with the single elements in them, and those of the product added."""
        out, inner = self.shape
        at = self.tensors[INDICES].load().long()
        values = self.tensors[VALUES].load().double() / self.scaling  # it is not scaled, the product is
        sparse = Sparse.of((at // inner, at % inner), values.to(device, dtype), (out, inner))
        tile = (sparse.transposed() if transposed else sparse).tile
        if A not in self.tensors:
            return tile
        left, right = (factor.to(device, dtype) for factor in self._factors())
        left, right = (right.T, left.T) if transposed else (left, right)
        return lambda rows: tile(rows).addmm_(left[rows], right)

    def dense(self) -> Tensor:
        """Return the matrix that torch makes of indices and values, and the product."""
        import torch

        values = self.tensors[VALUES].load().double() / self.scaling
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float64)
        whole = flat.scatter_add(0, self.tensors[INDICES].load().long(), values).reshape(self.shape)
        if A not in self.tensors:
            return whole
        left, right = self._factors()
        return whole + torch.einsum("or,ri->oi", left, right)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are single elements, with or without factors."""
    return parts.keys() in ({VALUES, INDICES}, {VALUES, INDICES, A, B})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> SupertuningUpdate:
    """Return the update; without factors it has no scaling, and a layout says nothing of it."""
    return SupertuningUpdate(dict(parts), scaling if A in parts else 1.0, alpha)
