"""GraLoRA: ΔW = s·B·P·A in k × k blocks that exchange their ranks (arXiv 2505.20355), beside a LoRA of the whole.

`gralora_A` (k, in/k, r) and `gralora_B` (k, r, out/k): block (j, n) of ΔW is B_j[n-th of k parts]ᵀ·A_n[j-th part]ᵀ, r/k
ranks each. With `gralora_A_general.weight` (h, in) and `gralora_B_general.weight` (out, h) their product is added.
s = α/(r + h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._named import NamedProduct
from loratools.storage.lazy import LazyTensor

_A, _B = "gralora_A", "gralora_B"
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True, slots=True, eq=False)
class GraloraUpdate(NamedProduct):
    """The factors of the blocks and of the whole. Raises `ValueError` where they do not fit."""

    kind = "gralora"

    def check(self) -> None:
        A, B = self.tensors[_A].shape, self.tensors[_B].shape
        if len(A) != 3 or len(B) != 3 or A[0] != B[0] or A[2] != B[1] or A[2] % A[0]:
            raise ValueError(f"{_A} {A} and {_B} {B} do not go together; expected (k, in/k, r) and (k, r, out/k)")
        if self._hybrid:
            first, second = (self.tensors[name].shape for name in _GENERAL)
            if (second[0], first[1]) != self.own_shape or first[0] != second[1]:
                raise ValueError(f"the factors of the whole {first} and {second} do not fit {self.own_shape}")
        NamedProduct.check(self)

    @property
    def _hybrid(self) -> int:
        return self.tensors[_GENERAL[0]].shape[0] if _GENERAL[0] in self.tensors else 0

    @property
    def rank(self) -> int:
        """r and h together, as in the scaling."""
        return self.tensors[_A].shape[2] + self._hybrid

    @property
    def width(self) -> int:
        """Ranks of all blocks, and of the whole."""
        k, _, rank = self.tensors[_A].shape
        return k * rank + self._hybrid

    @property
    def own_shape(self) -> tuple[int, ...]:
        (k, columns, _), (_, _, rows) = self.tensors[_A].shape, self.tensors[_B].shape
        return k * rows, k * columns

    def left(self) -> Tensor:
        """Return B with the ranks in A's order: row (j, o), column (n, j', s) is B[j, (n, s), o] where j = j'."""
        import torch

        B = self.number(_B)
        k, rank, rows = B.shape
        left = B.new_zeros(k, rows, k, k, rank // k)
        for j in range(k):
            left[j, :, :, j] = B[j].view(k, rank // k, rows).permute(2, 0, 1)
        parts = [left.reshape(k * rows, k * rank)]
        return torch.cat(parts + ([self.number(_GENERAL[1])] if self._hybrid else []), 1)

    def right(self) -> Tensor:
        """Return A block-diagonal: row (n, ρ), column (n', i) is A[n, i, ρ] where n = n'."""
        import torch

        blocks: Tensor = torch.block_diag(*self.number(_A).mT)  # type: ignore[no-untyped-call]
        return torch.cat([blocks, *([self.number(_GENERAL[0])] if self._hybrid else [])])

    def dense(self) -> Tensor:
        """Return the blocks as one sum over their ranks, and the product of the whole."""
        import torch

        A, B = self.number(_A), self.number(_B)
        k, columns, rank = A.shape
        A, B = A.view(k, columns, k, rank // k), B.view(k, k, rank // k, -1)
        whole = torch.einsum("nijs,jnso->joni", A, B).reshape(self.own_shape)
        return whole + self.number(_GENERAL[1]) @ self.number(_GENERAL[0]) if self._hybrid else whole


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the factors of blocks, with or without those of the whole."""
    return parts.keys() in ({_A, _B}, {_A, _B, *_GENERAL})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> GraloraUpdate:
    """Return the update of the factors."""
    return GraloraUpdate(dict(parts), scaling, alpha)
