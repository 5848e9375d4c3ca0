"""OFT: W' = R·W, a block-diagonal rotation of the output features (Qiu et al. 2023, arXiv 2306.07280), as in LyCORIS.

`oft_blocks` (n, b, b) gives R = (I + Q)·(I − Q)⁻¹ with Q = X − Xᵀ, and W'[k·b + m] = Σ_j R[k][j, m]·W[k·b + j]. `alpha`
is the constraint: Q is scaled down to ‖Q‖ = alpha·out where it is longer. `rescale` multiplies each row afterwards.
With a weight w it is W + w·(W' − W) before the rescaling. It acts on the weight that it finds: the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from loratools.adapter.basis import Basis
from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

BLOCKS_PART, RESCALE_PART = "oft_blocks", "rescale"


@dataclass(frozen=True, slots=True, eq=False)
class OftUpdate(OnWeight):
    """The blocks and the factors of rows. Raises `ValueError` for shapes that are none of a rotation."""

    blocks: LazyTensor
    rescale: LazyTensor | None
    alpha: float
    weight_shape: tuple[int, ...] | None = None

    kind = "oft"
    scaling = 1.0

    def __post_init__(self) -> None:
        blocks = self.blocks.shape
        if len(blocks) != 3 or blocks[1] != blocks[2] or 0 in blocks:
            raise ValueError(f"{BLOCKS_PART} has shape {blocks}, expected (n, b, b)")
        if self.rescale is not None and self.rescale.parameters != blocks[0] * blocks[1]:
            raise ValueError(f"{RESCALE_PART} has shape {self.rescale.shape}, expected {blocks[0] * blocks[1]} numbers")
        if self.weight_shape is not None and self.weight_shape[0] != blocks[0] * blocks[1]:
            raise ValueError(f"it rotates {blocks[0] * blocks[1]} features, the base's weight is {self.weight_shape}")

    def fitted(self, shape: tuple[int, ...]) -> OftUpdate:
        """Return the update of a base weight of this shape, which the blocks alone do not tell."""
        return replace(self, weight_shape=shape)

    def carried(self, basis: Basis) -> Self:
        """Return itself where columns alone are scaled, for R·W·diag(columns) is R of that; else raise `ValueError`."""
        if basis.rows is not None:
            raise ValueError("it rotates outputs that the base scales one by one, which is no rotation any more")
        return self

    @property
    def rank(self) -> int:
        """The size b of a block."""
        return self.blocks.shape[1]

    @property
    def layout(self) -> Mapping[str, Any]:
        return {"constraint": self.alpha}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or (self.blocks.shape[0] * self.blocks.shape[1], 1)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {BLOCKS_PART: self.blocks} | ({RESCALE_PART: self.rescale} if self.rescale else {})

    def _rotation(self, weight: float) -> tuple[Tensor, Tensor]:
        """Return Rᵀ of each block, weighted, and the factors (n, b), both in float64."""
        import torch

        X = self.blocks.load().double()
        count, size, _ = X.shape
        Q = X - X.transpose(1, 2)
        limit, length = self.alpha * count * size, float(Q.norm()) + 1e-8
        Q = Q * (limit / length) if 0 < limit < length else Q
        identity = torch.eye(size, dtype=torch.float64)
        R = (identity + Q) @ torch.linalg.inv(identity - Q)
        factors = torch.ones(count, size) if self.rescale is None else self.rescale.load()
        return (identity + weight * (R - identity)).transpose(1, 2), factors.double().reshape(count, size)

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Rotation:
        """Return the rotations; raise `IncompatibleAdapter` where the base stores the weight fused or transposed."""
        if site.transposed or site.part != (0, self.shape[0]) or site.rows != (0, site.matrix[0], 1):
            raise IncompatibleAdapter(f"{site.tensor}: OFT needs the weight whole, as [out, in, …]")
        R, factors = self._rotation(weight)
        return Rotation((R * factors[:, :, None]).to(device, dtype))

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ with the outputs of each block rotated, and scaled."""
        R, factors = self._rotation(weight)
        outputs = under.below(X).view(len(X), len(R), 1, -1) @ R.to(X).transpose(1, 2)
        return (outputs[:, :, 0] * factors.to(X)).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation(Term):
    """The term W ← blocks·W; the rows of a block must come together."""

    blocks: Tensor

    @property
    def together(self) -> int:
        """Rows that must be in one tile: those of a block."""
        return self.blocks.shape[1]

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        size = self.together
        blocks = self.blocks[rows.start // size : rows.stop // size]
        W.copy_((blocks @ W.reshape(len(blocks), size, -1)).reshape(W.shape))


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the blocks of OFT; four-dimensional ones are those of `boft_output`."""
    return BLOCKS_PART in parts and parts.keys() <= {BLOCKS_PART, RESCALE_PART} and len(parts[BLOCKS_PART].shape) == 3


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> OftUpdate:
    """Return the update; its alpha is the constraint, where no layout has it.

    A file without one gives its rank, which constrains nothing.
    """
    return OftUpdate(parts[BLOCKS_PART], parts.get(RESCALE_PART), layout["constraint"] if layout else alpha)
