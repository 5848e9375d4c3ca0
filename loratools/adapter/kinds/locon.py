"""LoCon with a Tucker core: ΔW[o,i,k,l] = Σ up[o,m]·mid[m,n,k,l]·down[n,i], the rank-decomposed convolution of LyCORIS.

up is (out, m, 1, 1), down (n, in, 1, 1), mid (m, n, kh, kw), s = α/n. Without a core it is kind `conv`. The names are
kohya's, but for A and B, which are PEFT's here as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.parts import A, B
from loratools.storage.lazy import LazyTensor

MID_PART = "lora_mid.weight"


@dataclass(frozen=True, slots=True, eq=False)
class LoconUpdate(LowRank):
    """s·up·(mid·down). Raises `ValueError` where the three do not go together."""

    down: LazyTensor
    mid: LazyTensor
    up: LazyTensor
    scaling: float
    alpha: float

    kind = "locon"

    def __post_init__(self) -> None:
        down, mid, up = self.down.shape, self.mid.shape, self.up.shape
        pointwise = all(len(s) == len(mid) and set(s[2:]) == {1} for s in (down, up))
        if len(mid) < 3 or not pointwise or (up[1], down[0]) != mid[:2] or 0 in down + mid + up:
            raise ValueError(f"down {down}, mid {mid} and up {up} do not go together")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1], *self.mid.shape[2:]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A: self.down, B: self.up, MID_PART: self.mid}

    def factored(self) -> Factors:
        """Return up as (out, m), and mid with down as (m, in·kh·kw), in float64."""
        rank, columns = self.mid.shape[0], prod(self.shape[1:])
        right = LazyTensor("F64", (rank, columns), self._mid_down, file=self.mid.file)
        return Factors(self.up.reshaped((self.shape[0], rank)), right, self.scaling)

    def weighted(self, weight: float) -> LoconUpdate:
        """Return the update with the scaling times the weight."""
        return replace(self, scaling=self.scaling * weight)

    def _mid_down(self) -> Tensor:
        import torch

        mid, down = self.mid.load().double(), self.down.load().double().flatten(1)
        return torch.einsum("mn...,ni->mi...", mid, down).flatten(1)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are two pointwise convolutions with a core between them."""
    return parts.keys() == {A, B, MID_PART}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> LoconUpdate:
    """Return the update of the three factors."""
    return LoconUpdate(parts[A], parts[MID_PART], parts[B], scaling, alpha)
