"""Block-affine transformation: W'ₘₙ = Wₘₙ + Wₘₙ·Bₘ + Bₘ for every block of r × r elements (PEFT's MiSS with "bat").

`miss_block` is B (out/r, r, r), one matrix for each row of blocks; files of older PEFT call it `bone_block`. There is
no alpha. It acts on the weight that it finds: the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.adapter.kinds.miss import NAMES
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class BatUpdate(Changing):
    """The matrices of the rows of blocks. Raises `ValueError` where the weight cannot be cut into such blocks."""

    kind = "bat"

    @property
    def _name(self) -> str:
        return next(iter(self.tensors))

    def check(self) -> None:
        """Raise `ValueError` for what are no such matrices, or for a weight without such blocks."""
        shape, weight = self.tensors[self._name].shape, self.weight_shape
        if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise ValueError(f"{self._name} has shape {shape}, expected (out/r, r, r)")
        if weight is not None and (len(weight) != 2 or weight[0] != shape[0] * shape[1] or weight[1] % shape[1]):
            raise ValueError(f"{self._name} has shape {shape}, the base's weight {weight} has no such blocks")

    @property
    def rank(self) -> int:
        return self.tensors[self._name].shape[1]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[self._name].shape[0] * self.rank, 0

    @property
    def together(self) -> int:
        """Rows of a block."""
        return self.rank

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W + W·B + B of the rows of blocks that come."""
        import torch

        B, size = self.tensors[self._name].load().to(device, dtype), self.rank

        def change(W: Tensor, rows: slice) -> Tensor:
            own = B[rows.start // size : rows.stop // size]
            blocks = W.reshape(len(own), size, -1, size)
            return (blocks + torch.einsum("manc,mcd->mand", blocks, own) + own[:, :, None, :]).reshape(W.shape)

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ + X·(W·B + B)ᵀ, the probes taken through each B first."""
        import torch

        B, size = self.number(self._name).to(X), self.rank
        W = under.below(torch.eye(X.shape[1], dtype=X.dtype)).reshape(X.shape[1] // size, size, len(B), size)
        probes = X.reshape(len(X), -1, size)
        through = torch.einsum("knd,mcd->kmnc", probes, B)
        added = torch.einsum("kmnc,ncma->kma", through, W) + torch.einsum("kd,mad->kma", probes.sum(1), B)
        return under.below(X) + added.flatten(1)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are matrices of rows of blocks; one flat matrix is that of `miss`."""
    return len(parts) == 1 and any(name in parts and len(parts[name].shape) == 3 for name in NAMES)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> BatUpdate:
    """Return the update; it has no scaling."""
    return BatUpdate(dict(parts))
