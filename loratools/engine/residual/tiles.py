"""One tile of a tensor, to its block and back: by `linalg/native/residual.c` where it serves, else in NumPy.

Both write the same blocks and read the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratools.engine.residual import Array, Lost, codes, prediction
from loratools.engine.residual.predict import Step
from loratools.linalg.native import residual as native


def encode(lost: Lost, W: Array, after: Array, steps: Sequence[Step], start: int) -> bytes:
    """Return the block of a tile: `W` and `after` are the bits of its rows from `start` on, of the base and merged."""
    assert lost.after is not None
    if (scan := _scan(lost, after, steps, start, W)) is not None:
        return codes.joined(scan.packed(), scan.at, scan.high.astype(W.dtype), len(W))
    return codes.encode(W, after, prediction(lost, after, steps, start), lost.dtype, lost.after.dtype)


def decode(lost: Lost, block: memoryview, after: Array, steps: Sequence[Step], start: int) -> Array:
    """Return the bits of the base's rows from `start` on; raise `BadFile` where the block does not fit the tile.

    They lie in memory that the next tile of this thread overwrites.
    """
    assert lost.after is not None
    if (scan := _scan(lost, after, steps, start)) is None:
        return codes.decode(block, after, prediction(lost, after, steps, start), lost.dtype, lost.after.dtype)
    packed, at, high = codes.apart(block, scan.spread, len(after), scan.P.dtype)
    return scan.place(np.frombuffer(packed, np.uint8), at.astype(np.uint32), high.astype(np.uint32))


def _scan(lost: Lost, after: Array, steps: Sequence[Step], start: int, W: Array | None = None) -> native.Scan | None:
    """Compare a tile with its predictions in C; None where that does not serve."""
    assert lost.after is not None
    if not native.available() or not {lost.dtype, lost.after.dtype} <= native.DTYPES.keys():
        return None
    predicted = native.widened(after, lost.after.dtype)
    rows = predicted.reshape(-1, lost.matrix[1])
    for step in reversed(steps):
        step.take_back_in_c(rows, start)
    # Only binades of equal dtypes can be compared; a cast leaves exceptions.
    return native.scan(predicted, after if lost.dtype == lost.after.dtype else None, lost.dtype, W)
