"""One output tensor of a merge, what is measured on it, and what computes its tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes
from loratools.storage.files import Read
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Restore = Callable[[int, int], None]
"""Puts the bytes of a base's tensor to where it will lie in the output: a file's descriptor, and an offset in it."""

Watch = Callable[[memoryview, memoryview, int], None]
"""Sees each tile of a tensor once it is written, in order: its bytes as they were, as they are, and its first row."""

TILE = 1 << 20
"""Bytes of one tile, about: it is cut at whole rows."""

SAMPLE = 16
"""Retention is measured on one tile in this many, and on at least one of each tensor."""

_PART, _FEWEST = 8, 1 << 16  # of a sampled tile one row in so many, first ones, or rows of so many elements


@dataclass(frozen=True, slots=True, eq=False)
class TensorTask:
    """One output tensor: `source` bytes, seen as a `matrix`, stored as `dtype` at `offset` of the descriptor `target`.

    `hashes` are the algorithms by which the source is hashed on the way. `retention` is `sample`, `full` or `off`;
    `seed` chooses the sample. `watch` is called where the source is not stored as codes, and keeps its dtype.
    """

    name: str
    source: TensorSpec
    matrix: tuple[int, int]
    dtype: str
    target: int
    offset: int
    hashes: Sequence[str] = ()
    retention: str = "sample"
    seed: int = 0
    watch: Watch | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """What a quantization lost of one weight, W' − W'' ≈ B·A, float32, and ‖W' − W'' − B·A‖²."""

    B: Array
    A: Array
    left2: float


@dataclass(slots=True, eq=False)
class TensorResult:
    """What was measured on the way: base digests by algorithm, and the sums behind the delta retention.

    retained = ⟨W' − W, ΔW⟩ and total = ⟨ΔW, ΔW⟩ over the measured rows, and the number of elements that `changed`, in
    float64, scaled up to the whole tensor. `overflowed` counts the numbers of which a cast to a narrower dtype made an
    infinity, `flushed` those that were not zero and became it. `lost` is ‖W'' − W'‖² of what became codes W'' again,
    and `loss` a product near that difference, where it is kept.
    """

    name: str
    digests: Mapping[str, str] = field(default_factory=dict)
    retained: float = 0.0
    total: float = 0.0
    changed: float = 0.0
    warnings: list[str] = field(default_factory=list)
    overflowed: int = 0
    flushed: int = 0
    lost: float = 0.0
    loss: Loss | None = None


def retention(results: Sequence[TensorResult]) -> float | None:
    """Return ⟨W' − W, ΔW⟩/‖ΔW‖² over tensors, the part of the change that survived; None where nothing was measured.

    A float64 change beyond 1e154 is not: no float64 holds its square.
    """
    total = sum(result.total for result in results)
    kept = sum(result.retained for result in results)
    return kept / total if total and math.isfinite(total) and math.isfinite(kept) else None


@dataclass(slots=True, eq=False)
class Changed:
    """A tile as it is to be written, the sums of `TensorResult` over its measured rows, and what a cast lost."""

    raw: memoryview
    retained: float
    total: float
    changed: float
    overflowed: int = 0
    flushed: int = 0


Tile = Callable[[int, int], Changed]
"""Writes the tile that begins at a row, of which so many first rows are measured."""


class Tiling(Protocol):
    """What writes one tensor tile by tile; a thread's own."""

    @property
    def together(self) -> int:
        """Number of rows that must come in one tile: tiles are multiples of it."""

    def tiles(
        self, step: int, take: Callable[[memoryview], None], stopped: Callable[[], bool]
    ) -> AbstractContextManager[Tile]:
        """Open the source, and give what reads, changes and writes a tile of `step` rows, the last one of the rest.

        `take` sees each tile as it was stored. Once `stopped` says True, `InterruptedError` is raised instead. Raises
        `IncompatibleAdapter` where a value is not finite in the output's dtype.
        """


class Arithmetic(Protocol):
    """What computes the tiles of one tensor in memory, whoever reads and writes them; a thread's own."""

    @property
    def together(self) -> int:
        """Number of rows that must come in one tile: tiles are multiples of it."""

    @property
    def needs_pass(self) -> bool:
        """Whether `observe` must see all tiles, in order, before the first is changed."""

    def room(self, rows: int) -> memoryview:
        """Return memory for a tile of so many rows as stored; valid until a thread's next tensor."""

    def observe(self, stored: memoryview, first: int) -> None:
        """Take in a tile whose first row is `first`, if `needs_pass`."""

    def change(self, stored: memoryview, first: int, measured: int) -> Changed:
        """Return the tile whose first row is `first` changed and rounded; its first `measured` rows are measured.

        Raises `IncompatibleAdapter` where a value is not finite in the output's dtype.
        """


def tile_reader(
    fill: Read, room: memoryview, step: int, matrix: tuple[int, int], stopped: Callable[[], bool]
) -> Callable[[int], memoryview]:
    """Return what reads the tile that begins at a row: `fill` puts it in `room`, and the next tile overwrites it.

    `step` is the rows of a tile, `matrix` the rows of the tensor and the bytes of one as stored. Once `stopped` says
    True, `InterruptedError` is raised instead.
    """
    rows, width = matrix

    def read(start: int) -> memoryview:
        if stopped():
            raise InterruptedError
        raw = room[: min(step, rows - start) * width]
        fill(raw, start * width)
        return raw

    return read


def sampled_tiles(name: str, seed: int, retention: str, tiles: int) -> frozenset[int]:
    """Choose the tiles of a tensor on which retention is measured, by the seed and the tensor's name alone."""
    if retention == "off" or not tiles:
        return frozenset()
    if retention == "full":
        return frozenset(range(tiles))
    from zlib import crc32  # what only plans draws no sample

    start = crc32(f"{seed}:{name}".encode()) % min(tiles, SAMPLE)
    return frozenset(range(start, tiles, SAMPLE))


def sampled_rows(retention: str, rows: int, columns: int) -> int:
    """Return how many rows of a sampled tile are measured: all if all of the tensor is, else enough of them."""
    return rows if retention == "full" else min(rows, max(1, rows // _PART, _FEWEST // max(1, columns)))


def near_zero(dtype: str) -> float | None:
    """Return the share of the largest term of a sum below which its error shows in a `dtype`; None where it never does.

    The error of a float32 sum is about 2^-24 of its largest term; it exceeds a unit in the last place of a p-bit result
    only below 2^(p-24) of that. A factor of four is for the length of the sum.
    """
    return 2.0 ** (dtypes.MANTISSA[dtype] - 22) if dtype in ("BF16", "F16") else None


def not_finite(name: str, dtype: str) -> IncompatibleAdapter:
    """Return the exception for a tensor with values that are not finite after the merge."""
    return IncompatibleAdapter(
        f"{name}: the merged values are not finite in {dtype}",
        hint="Either the base has infinities or NaN there, or the weights overflow this dtype.",
    )
