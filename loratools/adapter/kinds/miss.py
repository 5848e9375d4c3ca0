"""MiSS: ΔW[o, i] = M[i mod r, o mod c], a small matrix laid side by side (arXiv 2409.15371), as in PEFT.

`miss_block` is M (r, c): c = out, or with `init_weights = "mini"` a divisor of it. That is A·B with A the r×r identity
again and again, cut off at the end. Files of older PEFT call it `bone_block`. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor

NAMES = ("miss_block", "bone_block")


@dataclass(frozen=True, slots=True, eq=False)
class MissUpdate(LowRank):
    """The matrix. Raises `ValueError` where the base's outputs are no multiple of its columns."""

    name: str
    block: LazyTensor
    weight_shape: tuple[int, ...] | None = None

    kind = "miss"
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        block, weight = self.block.shape, self.weight_shape
        if 0 in block:
            raise ValueError(f"{self.name} is empty")
        if weight is not None and (len(weight) != 2 or weight[0] % block[1]):
            raise ValueError(f"{self.name} has shape {block}, which does not divide the base's weight {weight}")

    @property
    def rank(self) -> int:
        return self.block.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's once it is known; the matrix tells neither how many inputs there are nor how often it repeats."""
        return self.weight_shape or self.block.shape[::-1]

    @property
    def unsettled(self) -> str:
        return "" if self.weight_shape else "the shape of its weight"

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {self.name: self.block}

    def fitted(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a base weight of this shape."""
        return replace(self, weight_shape=shape)

    def factored(self) -> Factors:
        """Return Mᵀ, as often as the outputs need it, and the identity, as often as the inputs do."""
        (rank, width), (out, inner) = self.block.shape, self.shape

        def left() -> Tensor:
            return self.block.load().T.repeat(out // width, 1)

        def right() -> Tensor:
            import torch

            return torch.eye(rank, dtype=self.block.load().dtype).repeat(1, -(-inner // rank))[:, :inner]

        dtype, file = self.block.dtype, self.block.file
        return Factors(
            LazyTensor(dtype, (out, rank), left, file=file), LazyTensor(dtype, (rank, inner), right, file=file), 1.0
        )


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is such a matrix; blocks of three sides are those of `bat`."""
    return len(parts) == 1 and any(name in parts and len(parts[name].shape) == 2 for name in NAMES)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> MissUpdate:
    """Return the update; it has no scaling."""
    ((name, block),) = parts.items()
    return MissUpdate(name, block)
