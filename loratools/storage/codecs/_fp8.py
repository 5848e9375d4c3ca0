"""FP8 codes with scales that multiply, whoever wrote them: W = q · scale, the scale being that of the element's block.

What differs from scheme to scheme is the names of the parts, the block that shares a scale, and how new scales are
made: the first two are in `Fp8`, the third is one of the rules of `_scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from loratools.linalg.native import codes as native
from loratools.storage import dtypes
from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs._scales import POWERS, Rule, beyond, by_quotient, largest, read_back, rounded, stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import table

DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""The dtypes of the codes."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8(Encoding):
    """FP8 codes in the part `weight`, and scales in the part `scale`, "" where there are none: W = q.

    `rows`   of one matrix, in which blocks are counted from its first row: the last but one side, or a fraction of it
             where matrices that were quantized apart lie one below the other
    `rule`   how new scales are made
    The scales are those of matrix after matrix, block row after block row: as many numbers as there are blocks.
    """

    scale: str = ""
    rows: int = field(kw_only=True)
    rule: Rule = field(kw_only=True, default=by_quotient)

    @property
    def name(self) -> str:
        """The name of the weight, which is that of its codes."""
        return self.module.names["weight"]

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q · scale."""
        q, dtype = parts.joined("weight", first, first + len(out), lent=True), self.module.specs["weight"].dtype
        scales = self.scales(parts)[self._block_rows(first, len(out))] if self.scale else None
        form = dtype if dtype in native.FORMS else "bytes"
        if native.decode(q, form, table(dtype), out, scales=scales, width=self._sides[1]):
            return
        np.take(table(dtype), q, out=out, mode="wrap")
        if scales is not None:
            self._by_blocks(np.multiply, out, scales)

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Return what makes codes again; fresh scales are made by the scheme's rule, and none where it has none."""
        return _Encoder(self, parts, grid == "fresh" and bool(self.scale), draw)

    def scales(self, parts: Parts) -> Array:
        """Return the stored scales in float32: (block rows of all matrices, blocks of a row)."""
        return parts.constants(self.scale).reshape(self._blocks)

    @property
    def _sides(self) -> tuple[int, int]:
        return self.group or (self.rows, self.columns)

    @property
    def _blocks(self) -> tuple[int, int]:
        return Blocks(*self._sides, self.rows).grid(self.shape)

    def _block_rows(self, first: int, count: int) -> Array:
        """Return the block row of each of these rows, counted over all matrices."""
        height = self._sides[0]
        matrix, row = np.divmod(np.arange(first, first + count), self.rows)
        block_rows: Array = matrix * -(-self.rows // height) + row // height
        return block_rows

    def _by_blocks(self, operation: np.ufunc, W: Array, scales: Array) -> None:
        """Multiply or divide W, in place, by the scales of its rows: (rows, blocks of a row)."""
        width = self._sides[1]
        if scales.shape[1] == 1 or width == 1:
            operation(W, scales, out=W)
            return
        whole = self.columns // width
        inner = W[:, : whole * width].reshape(len(W), whole, width)
        operation(inner, scales[:, :whole, None], out=inner)
        if whole < scales.shape[1]:
            operation(W[:, whole * width :], scales[:, whole:], out=W[:, whole * width :])

    def _largest(self, first: int, W: Array) -> tuple[Array, Array]:
        """Return the block rows of these rows, and the largest magnitude of each of their blocks in them."""
        block_rows, starts = np.unique(self._block_rows(first, len(W)), return_index=True)
        by_row = np.maximum.reduceat(np.abs(W), starts, axis=0)
        return block_rows, np.maximum.reduceat(by_row, np.arange(0, self.columns, self._sides[1]), axis=1)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The sides of a block that shares a scale; a side longer than the matrix is one block.

    `rows` are those of a matrix in which blocks are counted, None for the last but one side of the weight.
    """

    height: int
    width: int
    rows: int | None = None

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the block rows of all matrices of a weight of this shape, and the blocks of a row."""
        rows = self.rows or shape[-2]
        return prod(shape[:-1]) // rows * -(-rows // self.height), -(-shape[-1] // self.width)

    def fit(self, scales: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Tell whether scales of this shape are one for each block of a weight of that shape."""
        block_rows, blocks = self.grid(shape)
        matrices = prod(shape[:-2])
        stacked = (*shape[:-2], block_rows // matrices) if block_rows % matrices == 0 else (block_rows,)
        return [side for side in scales if side != 1] == [side for side in (*stacked, blocks) if side != 1]


def of_stacks(choices: Sequence[Blocks], shape: tuple[int, ...]) -> list[Blocks]:
    """Return these blocks, and of a stack of experts those too by which a whole of them may share scales.

    Gate and up, quantized apart, lie one below the other; and there may be one scale for all experts.
    """
    *stack, rows, columns = shape
    halves = [Blocks(min(each.height, rows // 2), each.width, rows // 2) for each in choices]
    every = rows * prod(stack)
    more = [*(halves if rows % 2 == 0 else ()), Blocks(every, columns, every)]
    return [*choices, *(more if stack else ())]


def fitted(module: Module, scale: str, choices: Sequence[Blocks], rule: Rule) -> Fp8:
    """Return the encoding of a module whose FP8 codes share scales by the first of these blocks that fit the scales.

    `scale` names the part of the scales, "" where there are none.

    Raises `UnsupportedAdapter` for a weight that is no FP8 matrix, and for scales of another number or dtype.
    """
    module.need("weight", *([scale] if scale else []))
    weight = module.specs["weight"]
    sides = len(weight.shape)
    if weight.dtype not in DTYPES or sides < (2 if scale else 1) or not prod(weight.shape):
        raise module.refuse(f"its weight is {weight.dtype} {list(weight.shape)}, and FP8 of two sides was expected")
    scales = module.specs[scale].shape if scale else ()
    blocks = next((each for each in choices if not scale or each.fit(scales, weight.shape)), None)
    if blocks is None:
        tried = " or ".join(dict.fromkeys(f"{each.height} × {each.width}" for each in choices))
        raise module.refuse(
            f"its scales {list(scales)} do not fit the weight {list(weight.shape)} in blocks of {tried}"
        )
    if scale and (dtype := module.specs[scale].dtype) not in (*dtypes.FLOATS, *POWERS):
        raise module.refuse(f"its scales are {dtype}, which are no numbers")
    rows, columns = blocks.rows or weight.shape[-2], weight.shape[-1]
    height, width = min(blocks.height, rows), min(blocks.width, columns)
    named = {(rows, columns): "one scale a tensor", (1, columns): "one scale a row", (rows, 1): "one scale a column"}
    by = named.get((height, width), f"blocks of {blocks.height} × {blocks.width}") if scale else "no scales"
    what = "MXFP8" if scale and module.specs[scale].dtype in POWERS and blocks.width == 32 else "FP8"
    label = f"{what} {weight.dtype.removeprefix('F8_')}, {by}"
    together = 1 if height == rows else height if rows % height == 0 or rows == prod(weight.shape[:-1]) else rows
    group = (height, width) if (height, width) != (rows, columns) else None
    return Fp8(module, weight.shape, label, 8, group, together, scale, rows=rows, rule=rule)


_LEAST = np.finfo(np.float32).tiny
"""What numbers are divided by where a scale is zero: all but zero are then beyond the largest code."""


_SMALL = np.float32(2.0**-100)
"""Scales beyond it, or its inverse, may take numbers out of those that float32 has to full precision."""


class _Encoder:
    """Rounds numbers to codes: to the nearest, ties to even, or at random between the two neighbours.

    On the own grid a block keeps its scale, unless one of its numbers would round to beyond the largest code: clipped,
    a large change would be lost. Such a block gets a fresh scale.
    """

    def __init__(
        self, encoding: Fp8, parts: Parts, fresh: bool, draw: Callable[[tuple[int, ...]], Array] | None
    ) -> None:
        self._encoding, self._parts, self._fresh, self._draw = encoding, parts, fresh, draw
        self._dtype = encoding.module.specs["weight"].dtype
        self._largest = largest(self._dtype)
        self._limit = np.float32(self._largest if draw else beyond(self._dtype))
        self._codes = np.empty((prod(encoding.shape[:-1]), encoding.columns), np.uint8)
        blocks = encoding._blocks
        self._scales = np.ones(blocks, np.float32) if fresh or not encoding.scale else encoding.scales(parts).copy()
        self._made = np.zeros(blocks, bool)
        self._factors: Array | None = None
        self.needs_pass = bool(encoding.scale) and encoding.together == 1 and encoding._sides[0] > 1
        self._most = np.zeros(blocks if self.needs_pass else (0, 0), np.float32)

    def observe(self, first: int, W: Array) -> None:
        """Take in the largest magnitudes of the blocks."""
        if self.needs_pass:
            block_rows, most = self._encoding._largest(first, W)
            self._most[block_rows] = np.maximum(self._most[block_rows], most)

    def encode(self, first: int, W: Array) -> Array:
        """Round these rows, and return the numbers that their codes stand for."""
        encoding, of_rows = self._encoding, self._encoding._block_rows(first, len(W))
        if self._fresh or self.needs_pass:
            self._make_scales(first, W)
        x = self._divided(W, of_rows)
        if not self._fresh and encoding.scale and not self.needs_pass and max(x.max(), -x.min()) > self._limit:
            self._make_scales(first, W)
            x = self._divided(W, of_rows)
        codes = self._codes[first : first + len(W)]
        codes[:] = rounded(x, self._dtype, None if self._draw is None else self._draw(W.shape))
        if not self._fresh:
            self._keep(first, W, codes, of_rows)
        return self._numbers(codes, of_rows, x)

    def finish(self) -> Mapping[str, Array]:
        """Return the codes, and the scales if some are new."""
        encoding, specs = self._encoding, self._encoding.module.specs
        made = {"weight": self._codes.reshape(encoding.shape)}
        if self._made.any():
            spec = specs[encoding.scale]
            scales = self._parts.whole(encoding.scale).reshape(encoding._blocks).copy()
            scales[self._made] = stored(self._scales[self._made], spec.dtype)
            made[encoding.scale] = scales.reshape(spec.shape)
        return made

    def _divided(self, W: Array, of_rows: Array) -> Array:
        """Return W in steps of the codes: times the factors, or by the scales as they are read."""
        x = W.astype(np.float32)
        if self._factors is not None:
            self._encoding._by_blocks(np.multiply, x, self._factors[of_rows])
        elif self._encoding.scale:
            divisors = self._scales[of_rows]
            with np.errstate(over="ignore"):
                self._encoding._by_blocks(np.divide, x, np.where(divisors == 0, _LEAST, divisors))
        return x

    def _make_scales(self, first: int, W: Array) -> None:
        """Make the scales of the blocks of these rows that need one, as they will be read from the file."""
        encoding = self._encoding
        if self.needs_pass:
            block_rows = np.unique(encoding._block_rows(first, len(W)))
            most = self._most[block_rows]
        else:
            block_rows, most = encoding._largest(first, W)
        own = self._scales[block_rows]
        needed = np.isfinite(most) & (most > np.abs(own) * self._limit)
        needed |= self._fresh
        scales, factors = encoding.rule(most, self._largest)
        dtype = encoding.module.specs[encoding.scale].dtype
        self._scales[block_rows] = np.where(needed, read_back(scales, dtype), own)
        self._made[block_rows] |= needed
        if self._fresh and factors is not None and dtype == "F32":
            if self._factors is None:
                self._factors = np.ones_like(self._scales)
            self._factors[block_rows] = factors

    def _numbers(self, codes: Array, of_rows: Array, out: Array) -> Array:
        np.take(table(self._dtype), codes, out=out, mode="wrap")
        if self._encoding.scale:
            self._encoding._by_blocks(np.multiply, out, self._scales[of_rows])
        return out

    def _keep(self, first: int, W: Array, codes: Array, of_rows: Array) -> None:
        """Keep the old codes where they stand for the same numbers as before, or for W: zero has two codes."""
        before = self._parts.joined("weight", first, first + len(W))
        if self._is_plain and (before & np.uint8(127)).max() <= self._most_code:
            np.copyto(codes, before, where=((codes | before) & np.uint8(127)) == 0)
            return
        old, new = np.empty((2, *W.shape), np.float32)
        self._encoding.decode(self._parts, first, old)
        self._numbers(codes, of_rows, new)
        np.copyto(codes, before, where=(old == new) | (old == W) | (np.isnan(old) & np.isnan(W)))

    @cached_property
    def _most_code(self) -> int:
        """The code of the largest number: those above it, without their sign, are infinite, or no numbers."""
        return int(np.flatnonzero(table(self._dtype) == self._largest)[0])

    @cached_property
    def _is_plain(self) -> bool:
        """Tell whether all that is finite divides and multiplies exactly enough to come back to its code, but zero."""
        scales = np.abs(self._scales[self._scales != 0])
        return not self._dtype.endswith("FNUZ") and bool(((scales > _SMALL) & (scales < 1 / _SMALL)).all())
