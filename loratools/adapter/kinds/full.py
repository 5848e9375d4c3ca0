"""The whole difference, W' = W + diff, as LyCORIS' `full` stores it, with the bias's as `diff_b`; there is no alpha."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from loratools.adapter.basis import Basis, along
from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._rowwise import Rowwise
from loratools.storage.lazy import LazyTensor

WEIGHT_PART, BIAS_PART = "diff", "diff_b"


@dataclass(frozen=True, slots=True, eq=False)
class FullUpdate(Rowwise):
    """A difference of a weight of any shape, and of the bias. Raises `ValueError` where they do not go together."""

    difference: LazyTensor
    bias: LazyTensor | None = None
    names: tuple[str, str] = (WEIGHT_PART, BIAS_PART)
    kind: str = "full"

    rank = 0
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        shape = self.difference.shape
        if not shape or 0 in shape:
            raise ValueError(f"{self.names[0]} has shape {shape}, expected a weight")
        if self.bias is not None and self.bias.shape != shape[:1]:
            raise ValueError(f"{self.names[1]} has shape {self.bias.shape}, expected {shape[:1]}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.difference.shape

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {self.names[0]: self.difference} | ({self.names[1]: self.bias} if self.bias else {})

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows of the difference."""
        whole = self._matrix().to(device, dtype)
        whole = whole.T if transposed else whole
        return lambda rows: whole[rows]

    def _matrix(self) -> Tensor:
        return self.difference.load().reshape(self.shape[0], -1)

    def carried(self, basis: Basis) -> Self:
        """Return diag(rows)·diff·diag(columns), and the bias's; of a norm the one side that it has."""
        whole = along(along(self.difference, basis.rows, 0), basis.columns, 1)
        return replace(self, difference=whole, bias=None if self.bias is None else along(self.bias, basis.rows, 0))

    def dense(self) -> Tensor:
        """Return the difference."""
        return self._matrix().double()


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is a difference, with or without that of a bias."""
    return WEIGHT_PART in parts and parts.keys() <= {WEIGHT_PART, BIAS_PART}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> FullUpdate:
    """Return the update; it has no scaling."""
    return FullUpdate(parts[WEIGHT_PART], parts.get(BIAS_PART))
