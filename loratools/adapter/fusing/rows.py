"""Rows of an update's ΔW, and several below each other: for projections that the base stores apart or together.

LoHa, LoKr and whole differences have no factors that `products.py` could take apart. They make their rows one tile at a
time, so a merge can place some of the rows. No file holds such updates: `placement/image.py` makes them for a merge and
its proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter import factors
from loratools.adapter.fusing import products
from loratools.adapter.kinds import ByRows, Rows, Update
from loratools.adapter.kinds._rowwise import Rowwise
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Part(Rowwise):
    """Rows [start, stop) of the ΔW of a linear layer."""

    source: ByRows
    start: int
    stop: int
    kind: str
    scaling: float
    alpha: float

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.source.shape[1:])

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return self.source.parts

    @property
    def bias(self) -> LazyTensor | None:
        """Rows of the bias."""
        bias = self.source.bias
        return None if bias is None else factors.rows(bias, self.start, self.stop)

    def rows(self, dtype: torch.dtype, device: torch.device, transposed: bool) -> Rows:
        """Return some rows of the whole, or of its transpose some columns."""
        made, start, stop = self.source.rows(dtype, device, transposed), self.start, self.stop
        if transposed:
            return lambda rows: made(rows)[:, start:stop]
        return lambda rows: made(slice(start + rows.start, start + rows.stop))

    def dense(self) -> torch.Tensor:
        """Return the rows."""
        return self.source.dense()[self.start : self.stop]


@dataclass(frozen=True, slots=True, eq=False)
class Stack(Rowwise):
    """Several ΔW below each other, each with its own scaling; rows of zeros where a block is None."""

    blocks: tuple[ByRows | None, ...]
    sizes: tuple[int, ...]
    kind: str
    bias: LazyTensor | None = None
    scaling: float = 1.0
    alpha: float = 1.0

    @property
    def present(self) -> tuple[ByRows, ...]:
        """The blocks that are not None."""
        return tuple(block for block in self.blocks if block is not None)

    @property
    def rank(self) -> int:
        return max(block.rank for block in self.present)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.sizes), *self.present[0].shape[1:])

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {f"{i}.{name}": lazy for i, block in enumerate(self.blocks) if block is not None
                for name, lazy in block.parts.items()}  # fmt: skip

    def rows(self, dtype: torch.dtype, device: torch.device, transposed: bool) -> Rows:
        """Return the rows of each block that are asked for, below each other (transposed: beside each other)."""
        made = [block.rows(dtype, device, transposed) if block else None for block in self.blocks]

        def piece(i: int, first: int, last: int) -> torch.Tensor:
            import torch

            block, rows = self.blocks[i], made[i]
            if block is None or rows is None:
                sides = (last - first, self.sizes[i] if transposed else prod(self.shape[1:]))
                return torch.zeros(sides, dtype=dtype, device=device)
            return rows(slice(first, last)) * block.scaling

        def across(rows: slice) -> torch.Tensor:
            import torch

            return torch.cat([piece(i, rows.start, rows.stop) for i in range(len(made))], 1)

        def below(rows: slice) -> torch.Tensor:
            import torch

            tiles, at = [], 0
            for i, size in enumerate(self.sizes):
                first, last = max(rows.start - at, 0), min(rows.stop - at, size)
                if first < last:
                    tiles.append(piece(i, first, last))
                at += size
            return torch.cat(tiles)

        return across if transposed else below

    def dense(self) -> torch.Tensor:
        """Return all blocks, scaled, below each other."""
        import torch

        blocks = [
            torch.zeros(size, prod(self.shape[1:]), dtype=torch.float64)
            if block is None
            else block.scaling * block.dense()
            for block, size in zip(self.blocks, self.sizes, strict=True)
        ]
        return torch.cat(blocks)


def apart(update: Update, sizes: Sequence[int]) -> list[Update | None]:
    """Return the updates of consecutive blocks of output features, `sizes` each: factors where possible, else rows.

    Raises `ValueError` for an update that cannot give single rows, or where the sizes do not add up.
    """
    if products.divisible(update):
        return products.apart(update, sizes)
    source = update.by_rows
    if source is None or len(update.shape) != 2 or update.shape[0] != sum(sizes):
        raise ValueError(f"no update of kind {update.kind} can be divided so")
    return [
        Part(source, stop - size, stop, update.kind, update.scaling, update.alpha)
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]


def together(blocks: Sequence[Update | None], sizes: Sequence[int]) -> Update:
    """Return one update of consecutive blocks, of `sizes` output features: joined factors where possible, else rows.

    Each may be of a weight or of a bias, which has one side. The biases beside weights are put together likewise, with
    zeros where a block has none. Raises `ValueError` where a block cannot give single rows.
    """
    present = [block for block in blocks if block is not None]
    if all(products.divisible(block) for block in present):
        return products.together(blocks, sizes)
    by_rows = [None if block is None else block.by_rows for block in blocks]
    shapes = [None if block is None else block.shape for block in blocks]
    inner = present[0].shape[1:]
    fits = all(shape in (None, (size, *inner)) for shape, size in zip(shapes, sizes, strict=True))
    if not fits or len(inner) > 1 or any(block.by_rows is None for block in present):
        raise ValueError("not all of them can be put together")
    kind = "+".join(sorted({block.kind for block in present}))
    return Stack(tuple(by_rows), tuple(sizes), kind, _bias(blocks, sizes))


def _bias(blocks: Sequence[Update | None], sizes: Sequence[int]) -> LazyTensor | None:
    """Return the scaled biases of consecutive blocks as one; None where none has one."""
    biases = [None if block is None or block.bias is None else factors.scaled(block.bias, block.scaling)
              for block in blocks]  # fmt: skip
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is None:
        return None
    return factors.joined([bias or factors.zeros((size,), dtype) for bias, size in zip(biases, sizes, strict=True)])


def swapped(update: Update) -> Update:
    """Return the update with the two halves of its output features swapped."""
    if products.divisible(update):
        return products.swapped(update)
    half = update.shape[0] // 2
    first, second = apart(update, (half, half))
    return together((second, first), (half, half))
