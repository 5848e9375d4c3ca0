"""What FourierFT and WaveFT have in common: coefficients of a transform, at places drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Self

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._rowwise import Named


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum(Named):
    """Coefficients (n,) and `layout["seed"]` of their places. A kind gives `part`, their name, `rows` and `dense`.

    Raises `ValueError` for more coefficients than the weight has room for.
    """

    layout: Mapping[str, Any] = field(default_factory=dict)

    rank = 0
    part: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise `ValueError` for what are no coefficients, or not those of the base's weight."""
        shape, weight = self.tensors[self.part].shape, self.weight_shape
        if len(shape) != 1 or 0 in shape:
            raise ValueError(f"{self.part} has shape {shape}, expected (n,)")
        if weight is not None and (len(weight) != 2 or shape[0] > prod(weight)):
            raise ValueError(f"it has {shape[0]} coefficients, the base's weight has shape {weight}")

    def fitted(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a base weight of this shape, which the coefficients do not tell."""
        return replace(self, weight_shape=shape)

    @property
    def unsettled(self) -> str:
        return "" if self.weight_shape else "the shape of its weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or (1, self.tensors[self.part].shape[0])

    def places(self) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each coefficient, both (n,)."""
        out, inner = self.shape
        return drawn(self.layout["seed"], self.tensors[self.part].shape[0], (out, inner))

    def coefficients(self) -> Tensor:
        """Load the coefficients (n,) in float64."""
        return self.tensors[self.part].load().double()


@lru_cache(maxsize=64)
def drawn(seed: int, count: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of `count` different elements, drawn as PEFT's FourierFT and WaveFT draw them.

    Modules of one shape have the same ones, so they are drawn once.
    """
    import torch

    at = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count].clone()
    return at // shape[1], at % shape[1]
