"""Numbers become 4-bit codes of bitsandbytes again, in blocks; and codes of a weight that is stored transposed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from loratools.storage.codecs import Encoder, Grid, Module, Parts
from loratools.storage.codecs._bnb_int8 import reciprocal
from loratools.storage.codecs._levels import Draw
from loratools.storage.codecs._scales import read_back, stored
from loratools.storage.codecs.floats import Array

_TINY = np.float32(1e-38)
_TILE = 1 << 20


def nearest(values: Array, levels: Array) -> Array:
    """Return the index of the level nearest to each value; of two that are as near, the lower. `levels` are sorted."""
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, values, side="left")


def drawn(values: Array, levels: Array, draw: Draw) -> Array:
    """Return the index of one of the two levels beside each value, the nearer the likelier: right on average.

    Values beyond the levels get the outermost. `levels` are sorted; of equal ones the last is the upper neighbour.
    """
    lower = np.clip(np.searchsorted(levels, values, side="right") - 1, 0, len(levels) - 2)
    low, high = levels[lower], levels[lower + 1]
    gap = np.where(high > low, high - low, 1)
    return lower + (draw(values.shape) < (values - low) / gap)


@dataclass(slots=True)
class _Nested:
    """Scales that were quantized: the parts that are stored, and the scales that they stand for."""

    parts: dict[str, Array]
    scales: Array


@dataclass(eq=False)
class FourBitEncoder:
    """Makes 4-bit codes again; `scales` are those that the weight has, and become the new ones for fresh scales.

    On the own grid a block keeps its scale, unless a number of it would round to beyond the outermost code: clipped, a
    large change would be lost. Such a block gets a scale of its own, or the nearest that the codes of scales allow.
    """

    module: Module
    parts: Parts
    levels: Array  # what the codes stand for, by code
    columns: int
    block: int
    scales: Array
    nested: int | None
    offset: float
    kind: str
    grid: Grid
    draw: Draw | None
    codes: Array = field(init=False)
    made: dict[int, int] = field(init=False, default_factory=dict)  # block with a scale of its own -> code of the scale

    def __post_init__(self) -> None:
        self.codes = self.parts.rows("weight", 0, None).reshape(-1).view(np.uint8).copy()
        self.order = np.argsort(self.levels, kind="stable")
        self._sorted = self.levels[self.order]
        near_the_end, self._ends = self._sorted[[1, -2]], self._sorted[[0, -1]]  # of NF4 -0.70 and 0.72, -1 and 1
        self._reached = np.array([self._ends[0] < 0, self._ends[1] > 0])  # which signs the codes have numbers of
        ratios = near_the_end[self._reached] / self._ends[self._reached]
        self.limit = np.float32(1 if self.draw else (3 - ratios.max()) / 2)
        if self.grid == "fresh":
            self.scales = np.zeros_like(self.scales)

    @property
    def needs_pass(self) -> bool:
        """Whether the mean of all scales is wanted before the first code: with double quantization alone."""
        return self.grid == "fresh" and self.nested is not None

    def observe(self, first: int, W: Array) -> None:
        """Note the scale of every block: of the library's codes, which end at -1 and 1, its largest magnitude."""
        start = first * self.columns // self.block
        tops = self._least_scales(self._blocks(W))
        self.scales[start : start + len(tops)] = tops

    def encode(self, first: int, W: Array) -> Array:
        """Choose the code nearest to each number, and return what the codes stand for."""
        start = first * self.columns // self.block
        if self.grid == "fresh" and not self.needs_pass:
            self.observe(first, W)
        blocks = self._blocks(W)
        which = slice(start, start + len(blocks))
        if self.grid == "own":
            self._widen(start, blocks)
        scales = self._stored(which)[:, None]
        half, count = start * self.block // 2, (W.size + 1) // 2
        if self.grid == "own":
            old = np.zeros(blocks.size, np.uint8)
            bits = self.codes[half : half + count]
            old[: 2 * count : 2], old[1 : 2 * count : 2] = bits >> 4, bits & 15
            unchanged = (self.levels[old].reshape(blocks.shape) * scales == blocks) | (scales == 0)
            unchanged.reshape(-1)[W.size :] = True
            new = np.where(unchanged, old.reshape(blocks.shape), self._chosen(blocks, reciprocal(scales)))
        elif self.draw is not None:
            new = self._chosen(blocks, reciprocal(scales))
        else:
            new = self._chosen(blocks, 1 / np.maximum(self.scales[which][:, None], _TINY), W.size % self.block)
        flat = new.reshape(-1).astype(np.uint8)
        self.codes[half : half + count] = (flat[: 2 * count : 2] << 4) | flat[1 : 2 * count : 2]
        values: Array = (self.levels[new] * scales).reshape(-1)[: W.size].reshape(W.shape)
        return values

    def finish(self) -> Mapping[str, Array]:
        """Return the codes, and the scales where they are new."""
        spec = self.module.specs["weight"]
        changed = {"weight": self.codes.view(self.parts.rows("weight", 0, 0).dtype).reshape(spec.shape)}
        if self.grid == "own" and not self.made:
            return changed
        if self.nested is not None and self.grid == "own":
            absmax_codes = self.parts.whole("absmax").copy()
            absmax_codes[list(self.made)] = list(self.made.values())
            return changed | {"absmax": absmax_codes}
        if self.nested is not None:
            return changed | self._requantized.parts
        return changed | {"absmax": stored(self.scales, self.module.specs["absmax"].dtype)}

    def _widen(self, start: int, blocks: Array) -> None:
        """Make scales for those blocks, of which the first is number `start`, whose numbers are beyond the codes."""
        tops = self._least_scales(blocks)
        few = np.flatnonzero(np.isfinite(tops) & (tops > np.abs(self.scales[start : start + len(tops)]) * self.limit))
        if not few.size:
            return
        numbers_of_blocks, tops = few + start, tops[few]
        if self.nested is None:
            new, codes = read_back(tops, self.module.specs["absmax"].dtype), np.zeros(len(few), np.uint8)
        else:
            levels, of_blocks = self.parts.numbers("nested_quant_map"), self.parts.whole("nested_absmax")
            factors, offset = of_blocks[numbers_of_blocks // self.nested], np.float32(self.offset)
            codes = nearest((tops - offset) * reciprocal(factors), levels).astype(np.uint8)
            new = levels[codes] * factors + offset
        better = new > np.abs(self.scales[numbers_of_blocks])
        self.scales[numbers_of_blocks[better]] = new[better]
        self.made |= dict(zip(numbers_of_blocks[better].tolist(), codes[better].tolist(), strict=True))

    def _least_scales(self, blocks: Array) -> Array:
        """Return the least scale of each block by which the outermost codes reach all its numbers."""
        outermost = np.stack([blocks.min(axis=1), blocks.max(axis=1)])
        scales = (outermost[self._reached] / self._ends[self._reached, None]).max(axis=0)
        least: Array = np.abs(np.maximum(scales, 0))  # never -0.0
        return least

    def _stored(self, which: slice) -> Array:
        """Return some scales as they will be read."""
        if self.grid == "fresh" and self.nested is not None:
            return self._requantized.scales[which]
        dtype = self.module.specs["absmax"].dtype
        fresh = self.grid == "fresh" and dtype != "F32"
        return read_back(self.scales[which], dtype) if fresh else self.scales[which]

    def _blocks(self, W: Array) -> Array:
        flat = np.ascontiguousarray(W, np.float32).reshape(-1)
        if flat.size % self.block:
            flat = np.concatenate([flat, np.zeros(-flat.size % self.block, np.float32)])
        return flat.reshape(-1, self.block)

    def _chosen(self, blocks: Array, reciprocal: Array, ragged: int = 0) -> Array:
        """Return the codes of blocks that become numbers from -1 to 1 by their scales' reciprocals."""
        levels, ends = self._sorted, self._ends
        scaled = np.clip(blocks * reciprocal, *ends)
        if ragged:  # the library divides the last block where it is not whole
            scaled[-1] = np.clip(blocks[-1] / np.maximum(self.scales[-1], _TINY), *ends)
        index = nearest(scaled, levels) if self.draw is None else drawn(scaled, levels, self.draw)
        codes: Array = self.order[index]
        return codes

    @cached_property
    def _requantized(self) -> _Nested:
        """Quantize the scales, of which all blocks are known, by their mean and 8-bit codes in blocks of `nested`."""
        assert self.nested is not None
        mean = np.float32(self.scales.mean(dtype=np.float64))
        levels = self.parts.numbers("nested_quant_map")
        count = len(self.scales)
        padded = np.zeros(-(-count // self.nested) * self.nested, np.float32)
        padded[:count] = self.scales - mean
        blocks = padded.reshape(-1, self.nested)
        tops = np.abs(blocks).max(axis=1)
        codes = nearest(np.clip(blocks * (1 / np.maximum(tops, _TINY))[:, None], -1, 1), levels).astype(np.uint8)
        scales = (levels[codes] * tops[:, None]).reshape(-1)[:count] + mean
        changed = {"absmax": codes.reshape(-1)[:count], "nested_absmax": tops, self.kind: self._state(mean)}
        return _Nested(changed, scales)

    def _state(self, mean: np.float32) -> Array:
        """Return the JSON with the new mean, as long as the old one: as the library writes it, else shorter, padded."""
        old = bytes(self.parts.whole(self.kind))
        state = json.loads(old)
        for offset in (float(mean), float(str(mean))):
            for separators in ((", ", ": "), (",", ":")):
                new = json.dumps({**state, "nested_offset": offset}, separators=separators).encode()
                if len(new) <= len(old):
                    return np.frombuffer(new.ljust(len(old)), np.uint8)
        raise self.module.refuse("its quant_state has no room for the mean of new scales", "Use its own grid.")


class TurnedEncoder:
    """Makes codes of [out, in] again from rows of [in, out].

    A row is a column of every block, so that all are wanted before the first code: the weight is held in float32. The
    largest of a model that has such layers (GPT-2 XL) takes 41 MB.
    """

    needs_pass = True

    def __init__(self, encoder: Encoder, shape: tuple[int, int], together: int) -> None:
        self._encoder, self._together = encoder, together
        self._W = np.zeros(shape, np.float32)
        self._values: Array | None = None

    def observe(self, first: int, W: Array) -> None:
        """Hold the rows of W, which are columns of the codes."""
        self._W[:, first : first + len(W)] = W.T

    def encode(self, first: int, W: Array) -> Array:
        """Return the numbers that the codes of these rows stand for; all are chosen at the first call."""
        if self._values is None:
            self._values = self._encoded()
        values: Array = self._values[:, first : first + len(W)].T
        return values

    def finish(self) -> Mapping[str, Array]:
        """Return the parts that changed."""
        return self._encoder.finish()

    def _encoded(self) -> Array:
        step = max(1, _TILE // (self._together * self._W.shape[1])) * self._together
        firsts = range(0, len(self._W), step)
        if self._encoder.needs_pass:
            for first in firsts:
                self._encoder.observe(first, self._W[first : first + step])
        for first in firsts:
            self._W[first : first + step] = self._encoder.encode(first, self._W[first : first + step])
        return self._W
