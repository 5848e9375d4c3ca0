"""Tiles of one tensor, to their blocks and back: by `linalg/native/residual.c` where it serves, else in NumPy.

Both write the same blocks and read the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratools.engine.residual import LENGTH, Array, Lost, codes, prediction
from loratools.engine.residual.predict import Step
from loratools.linalg.native import residual as native
from loratools.linalg.native.steps import Product, product


class Coder:
    """Codes the tiles of one tensor of the base, and reads them, any number of threads at a time."""

    def __init__(self, lost: Lost, steps: Sequence[Step]) -> None:
        """Take a tensor that is predicted, and the `steps` that its change took (`predict.steps`), measured."""
        assert lost.after is not None
        self._lost, self._steps, self._dtypes = lost, steps, (lost.after.dtype, lost.dtype)
        self._native = None
        served = set(self._dtypes) <= native.DTYPES.keys() and all(step.site.columns[2] == 1 for step in steps)
        if native.available() and served:
            self._native = native.Coder([_product(step) for step in steps], lost.matrix[1], *self._dtypes)

    def encode(self, W: Array, after: Array, start: int) -> bytes:
        """Return the block of a tile; `W` and `after` are the bits of its rows from `start` on, before and after."""
        if self._native and (coded := self._native.encode(W, after, start)):
            if coded.raw is None:
                return codes.joined(coded.ranks, coded.at, coded.high.astype(W.dtype), len(W))
            return codes.framed(coded.form, len(coded.at), coded.ranks, coded.raw)
        predicted = prediction(self._lost, after, self._steps, start)
        return codes.encode(W, after, predicted, self._lost.dtype, self._dtypes[0])

    def blocks(self, W: Array, after: Array, start: int, stop: int, height: int) -> bytes:
        """Return the blocks of tiles of `height` rows, `start` to `stop`, each after its length: `encode`."""
        parts, columns, first = [], self._lost.matrix[1], start
        while start < stop:
            at = (start - first) * columns
            if self._native and columns:
                made, count = self._native.blocks(W[at:], after[at:], start, height)
                parts.append(made)
                start, at = start + count * height, at + count * height * columns
            if start < stop:  # what C does not frame
                tile = slice(at, at + height * columns)
                block = self.encode(W[tile], after[tile], start)
                parts += [LENGTH.pack(len(block)), block]
                start += height
        return b"".join(parts)

    def decode(self, block: memoryview, after: Array, start: int) -> Array:
        """Return the bits of the base's rows from `start` on; raise `BadFile` where the block does not fit the tile.

        They lie in memory that the next tile of this thread overwrites.
        """
        if self._native:
            width = 4 if self._lost.dtype == "F32" else 2
            form, count, ranks, raw = codes.unframed(block, len(after), width)
            packed, exceptions = np.frombuffer(ranks, np.uint8), np.frombuffer(raw, np.uint8)
            W = self._native.decode(after, packed, form, count, exceptions, start)
            if W is not None:
                return W
        predicted = prediction(self._lost, after, self._steps, start)
        return codes.decode(block, after, predicted, self._lost.dtype, self._dtypes[0])


def _product(step: Step) -> Product:
    """Return a step as C takes it."""
    by_row, by_column = (None, step.gains) if step.across else (step.gains, None)
    columns = step.site.columns[:2]
    return product(step.site.rows, columns, step.left, step.right, by_row=by_row, by_column=by_column)
