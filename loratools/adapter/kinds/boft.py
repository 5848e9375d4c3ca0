"""BOFT: W' = diag(s)·W·Mᵀ, M a product of sparse rotations as in a fast Fourier transform (arXiv 2311.06243).

`boft_R` (m, n, b, b) has m factors of n blocks; R = (I − Q)(I + Q)⁻¹ with Q = (X − Xᵀ)/2 of each. A factor i is
P_i·diag(R_i)·P_iᵀ with PEFT's butterfly permutation P_i, none where m is 1, and M = M_m⋯M_1. `boft_s` (out, 1) scales
outputs. A kernel is flattened. With a weight w it is W + w·(W' − W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

BLOCKS, SCALES = "boft_R", "boft_s"


@dataclass(frozen=True, slots=True, eq=False)
class BoftUpdate(Changing):
    """The blocks and the scales. Raises `ValueError` for shapes that are none of rotations."""

    kind = "boft"

    def check(self) -> None:
        shape, scales = self.tensors[BLOCKS].shape, self.tensors[SCALES].shape
        if len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
            raise ValueError(f"{BLOCKS} has shape {shape}, expected (m, n, b, b)")
        if max(scales, default=0) != self.tensors[SCALES].parameters:
            raise ValueError(f"{SCALES} has shape {scales}, expected one number for each output")
        if shape[0] > 1 and (shape[1] % 2 ** (shape[0] - 1) or shape[2] % 2):
            raise ValueError(f"{BLOCKS} has shape {shape}, which is no butterfly of even blocks")
        Changing.check(self)

    @property
    def rank(self) -> int:
        """The size b of a block."""
        return self.tensors[BLOCKS].shape[2]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[SCALES].parameters, self.tensors[BLOCKS].shape[1] * self.rank

    def skew(self) -> Tensor:
        """Return Q of each block, (m, n, b, b), in float64."""
        X = self.number(BLOCKS)
        return (X - X.mT) / 2

    def permutations(self) -> list[Tensor]:
        """Return of each factor where feature j of its blocks comes from: (P·x)_j = x[permutation_j]."""
        factors, blocks, size, _ = self.tensors[BLOCKS].shape
        return [butterfly(blocks * size, blocks >> i, size // 2, factors) for i in range(factors)]

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W·Mᵀ, factor after factor, with rows scaled."""
        import torch

        Q, identity = self.skew(), torch.eye(self.rank, dtype=torch.float64)
        R = torch.linalg.solve(identity + Q, identity - Q, left=False).to(device, dtype)
        orders = [order.to(device) for order in self.permutations()]
        scales = self.number(SCALES).flatten().to(device, dtype)

        def changed(W: Tensor, rows: slice) -> Tensor:
            Y = W.flatten(1)
            for blocks, order in zip(R, orders, strict=True):
                # Of a row y of W: y·(P·R·Pᵀ)ᵀ = P(R·Pᵀy).
                inside = torch.empty_like(Y)
                inside[:, order] = Y
                turned = (inside.view(len(Y), len(blocks), 1, -1) @ blocks.mT).flatten(1)
                Y = turned[:, order]
            return (Y * scales[rows, None]).reshape(W.shape)

        return changed

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return ((X·M)·Wᵀ)∘s, with M dense and R by the inverse."""
        import torch

        _, count, size, _ = self.tensors[BLOCKS].shape
        M, identity = torch.eye(count * size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        for Q, order in zip(self.skew(), self.permutations(), strict=True):
            P = torch.eye(count * size, dtype=torch.float64)[order]
            D: Tensor = torch.block_diag(*((identity - Q) @ torch.linalg.inv(identity + Q)))  # type: ignore[no-untyped-call]
            M = P @ D @ P.T @ M
        return under.below(X @ M.to(X)) * self.number(SCALES).flatten().to(X)[under.site.part_rows]


def butterfly(features: int, blocks: int, half: int, factors: int) -> Tensor:
    """Return the permutation of PEFT's `block_butterfly_perm`: in each block, pieces of `half` by evens, then odds."""
    import torch

    order = torch.arange(features)
    if factors == 1:
        return order
    size = features // blocks
    pieces = torch.arange(size).view(size // half, half)
    inside = torch.cat([pieces[0::2], pieces[1::2]]).flatten()
    return (order.view(blocks, size)[:, inside]).flatten()


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the blocks and scales of BOFT."""
    return parts.keys() == {BLOCKS, SCALES}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> BoftUpdate:
    """Return the update; it has no scaling."""
    return BoftUpdate(dict(parts))
