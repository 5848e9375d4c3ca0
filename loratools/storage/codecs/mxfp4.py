"""MXFP4 as gpt-oss stores its experts: FP4 in blocks of 32 along the input, each with a power of two.

`gate_up_proj_blocks` U8 [E, out, in/32, 16], two codes a byte, the first in the low bits, and `gate_up_proj_scales` U8
[E, out, in/32]: w = level(code)·2^(scale - 127). The model's parameter `gate_up_proj` is the transpose [E, in, out],
and so it is in the checkpoints of gpt-oss in 16 bit: that is what this codec shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs._levels import FP4, Draw, reach
from loratools.storage.codecs._packed import pack, unpack
from loratools.storage.codecs._powers import exponents
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import listed
from loratools.storage.codecs.tables import table

BLOCK = 32


def opened(module: Module) -> Encoding:
    """Return how a stack of experts is stored; raise `UnsupportedAdapter` for blocks and scales that do not fit."""
    module.need("blocks", "scales")
    blocks, scales = module.specs["blocks"], module.specs["scales"]
    if blocks.dtype != "U8" or scales.dtype not in ("U8", "F8_E8M0") or len(blocks.shape) != 4:
        raise module.refuse(f"its blocks are {blocks.dtype} {list(blocks.shape)}, its scales {scales.dtype}")
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK // 2:
        raise module.refuse(f"its blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit each other")
    experts, out, count, _ = blocks.shape
    return MxFp4(module, (experts, count * BLOCK, out), "FP4, blocks of 32, transposed", 4, (BLOCK, 1), BLOCK)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with the modules of these stacks in `modules_to_not_convert`."""
    known = listed(statement, "modules_to_not_convert", ())
    owners = dict.fromkeys(path.rpartition(".")[0] or path for path in modules)
    return {**statement, "modules_to_not_convert": [*known, *(path for path in owners if path not in known)]}


@dataclass(frozen=True, slots=True, eq=False)
class MxFp4(Encoding):
    """Experts [E, in, out] whose blocks lie along `in`."""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write level·2^(scale - 127), transposed."""
        done = 0
        while done < len(out):  # one expert after another
            expert, row = divmod(first + done, self.shape[-2])
            count = min(len(out) - done, self.shape[-2] - row)
            self._rows(parts, expert, row, out[done : done + count])
            done += count

    def _rows(self, parts: Parts, expert: int, start: int, out: Array) -> None:
        """Write rows of one expert; bytes are turned, which are an eighth of the numbers."""
        stop = start + len(out)
        stored, scales = parts.matrix("blocks", expert), parts.matrix("scales", expert)
        pairs = np.ascontiguousarray(stored.reshape(len(stored), -1)[:, start // 2 : (stop + 1) // 2].T)
        W = np.empty((len(pairs), 2, self.columns), np.float32)
        W[:, 0] = FP4.table[pairs & 15]
        W[:, 1] = FP4.table[pairs >> 4]
        powers = table("F8_E8M0")[np.ascontiguousarray(scales[:, start // BLOCK : -(-stop // BLOCK)].T)]
        of_rows = np.arange(start, stop) // BLOCK - start // BLOCK
        np.multiply(W.reshape(-1, self.columns)[start % 2 :][: len(out)], powers[of_rows], out=out)

    def block(self, parts: Parts, expert: int, start: int, stop: int) -> tuple[Array, Array]:
        """Return the codes (out, n) and the bytes of the scales (out, blocks) of whole blocks around these rows."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        stored = parts.matrix("blocks", expert)[:, first:last]
        codes = unpack(stored.reshape(len(stored), -1), 4, (last - first) * BLOCK)
        return codes, parts.matrix("scales", expert)[:, first:last]

    @staticmethod
    def numbers(codes: Array, scales: Array) -> Array:
        """Return what codes (out, n) stand for."""
        W = FP4.table[codes].reshape(*scales.shape, BLOCK)
        W *= table("F8_E8M0")[scales][..., None]
        return W.reshape(codes.shape)

    def encoder(self, parts: Parts, grid: Grid, draw: Draw | None = None) -> Encoder:
        """Return what makes codes again; see `Encoding.encoder`."""
        return _Encoder(self, parts, grid, draw)


def _along(draw: Draw | None) -> Draw | None:
    """Return what draws for the transpose of rows."""
    return None if draw is None else lambda shape: draw(shape[::-1]).T


class _Encoder:
    """Makes blocks of rows again, whole blocks at a time.

    On the own grid a block keeps its scale, unless a changed number of it would round to beyond the largest level:
    clipped, a large change would be lost. Such a block gets the scale that fits it.
    """

    needs_pass = False

    def __init__(self, encoding: MxFp4, parts: Parts, grid: Grid, draw: Draw | None) -> None:
        specs = encoding.module.specs
        self._encoding, self._parts, self._draw, self._fresh = encoding, parts, draw, grid == "fresh"
        self._blocks = np.empty(specs["blocks"].shape, np.uint8)
        self._scales = np.empty(specs["scales"].shape, np.uint8)
        self._made, self._limit = self._fresh, reach(FP4, at_random=draw is not None)[1]

    def observe(self, first: int, W: Array) -> None:
        """Do nothing: each block has its own scale."""

    def encode(self, first: int, W: Array) -> Array:
        """Make codes of rows, and return what they stand for."""
        encoding, sides, done = self._encoding, self._encoding.shape, 0
        result = np.empty_like(W)
        while done < len(W):
            expert, row = divmod(first + done, sides[-2])
            count = min(len(W) - done, sides[-2] - row)
            wanted = np.ascontiguousarray(W[done : done + count].T)
            old, scales = encoding.block(self._parts, expert, row, row + count)
            before = encoding.numbers(old, scales)
            x = wanted.reshape(*scales.shape, BLOCK) / table("F8_E8M0")[scales][..., None]
            moved = (np.abs(x).max(axis=-1) > self._limit) & (before != wanted).reshape(x.shape).any(axis=-1)
            new = scales
            if self._fresh or moved.any():
                fitting = exponents(wanted.reshape(x.shape), FP4)
                new = fitting if self._fresh else np.where(moved, fitting, scales)
                x = wanted.reshape(x.shape) / table("F8_E8M0")[new][..., None]
                self._made = True
            codes = FP4.codes(x.reshape(wanted.shape), _along(self._draw))
            codes = np.where((before == wanted) & np.repeat(new == scales, BLOCK, axis=1), old, codes)
            span = slice(row // BLOCK, (row + count) // BLOCK)
            self._blocks[expert, :, span] = pack(codes, 4, count // 2).reshape(len(codes), -1, BLOCK // 2)
            self._scales[expert, :, span] = new
            result[done : done + count] = encoding.numbers(codes, new).T
            done += count
        return result

    def finish(self) -> Mapping[str, Array]:
        """Return the blocks, and the scales where they are new."""
        return {"blocks": self._blocks} | ({"scales": self._scales} if self._made else {})
