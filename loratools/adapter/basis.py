"""Another basis of a weight: what stands before and behind a layer is scaled, and its weight the other way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The weight diag(rows)·W·diag(columns) in the place of W; both in float64, None for a side that stays.

    `read` gives rows of the weight in that basis, in float64; `weight` is that of the adapter in a merge.
    """

    rows: Tensor | None
    columns: Tensor | None
    read: Callable[[slice], Tensor]
    weight: float = 1.0


def along(lazy: LazyTensor, factors: Tensor | None, axis: int) -> LazyTensor:
    """Stand for a tensor times `factors` along an axis, in float32, or in float64 where it is; None leaves it.

    Raises `ValueError` where it has another number of features there.
    """
    if factors is None:
        return lazy
    if len(lazy.shape) <= axis or lazy.shape[axis] != len(factors):
        raise ValueError(f"its tensor of shape {lazy.shape} has no {len(factors)} features along side {axis}")
    sides = tuple(-1 if i == axis else 1 for i in range(len(lazy.shape)))
    return made(lazy.shape, lambda: lazy.load().double() * factors.reshape(sides), lazy, double=lazy.dtype == "F64")


def made(shape: tuple[int, ...], make: Callable[[], Tensor], source: LazyTensor, *, double: bool = False) -> LazyTensor:
    """Stand for a tensor that `make` makes in float64 out of `source`, rounded to float32 unless `double`."""
    if double:
        return LazyTensor("F64", shape, make, file=_file(source))
    return LazyTensor("F32", shape, lambda: make().float(), file=_file(source))


def rescaled(m: LazyTensor, product: Callable[[slice], Tensor], basis: Basis, count: int) -> LazyTensor:
    """Stand for the magnitudes that rescale in another basis by the factors of this one.

    The factor of row o is m_o/‖Y_o‖ with Y = W + ΔW, which `product` gives in the other basis, (n, columns) in float64:
    there it is m'_o/‖Y'_o‖, so m'_o = m_o·rows_o·‖Y'_o‖/‖Y'_o·diag(1/columns)‖. There are `count` rows.
    """

    def make() -> Tensor:
        import torch

        ratios = []
        for start in range(0, count, _ROWS):
            Y = product(slice(start, min(start + _ROWS, count)))
            back = Y if basis.columns is None else Y / basis.columns
            norms = back.norm(dim=1)
            ratios.append(torch.where(norms > 0, Y.norm(dim=1) / norms, 1.0))
        ratio = torch.cat(ratios)
        ratio = ratio if basis.rows is None else ratio * basis.rows
        return (m.load().double().flatten() * ratio).reshape(m.shape)

    return made(m.shape, make, m, double=m.dtype == "F64")


_ROWS = 256


def _file(lazy: LazyTensor) -> Path | None:
    return lazy.file or (lazy.spec.file if lazy.spec else None)
