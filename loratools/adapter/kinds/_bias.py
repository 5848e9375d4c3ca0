"""The bias of B, PEFT's `lora_bias`, as an update of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.parts import BIAS
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class BiasUpdate(LowRank):
    """PEFT's `lora_bias`, b' = b + s·c: the bias (out,) of the module is seen as a matrix of one column."""

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
        return {BIAS: self.c}

    def factored(self) -> Factors:
        """Return c as a column, and a one."""
        return Factors(self.c.reshaped(self.shape), self.c.map(lambda c: c.new_ones(1, 1), (1, 1)), self.scaling)
