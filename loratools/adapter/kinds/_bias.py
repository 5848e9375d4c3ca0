"""The second place of an update with PEFT's `lora_bias`: b' = b + s·c for the bias b (out,) of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class BiasUpdate(LowRank):
    """s·c for a bias that is seen as a matrix of one column."""

    c: LazyTensor
    scaling: float
    alpha: float

    kind = "lora_bias"
    rank = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.c.shape, 1

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"lora_B.bias": self.c}

    def factored(self) -> Factors:
        """Return c as a column, and a one."""
        return Factors(self.c.reshaped(self.shape), LazyTensor("F32", (1, 1), _one), self.scaling)


def _one() -> torch.Tensor:
    import torch

    return torch.ones(1, 1)
