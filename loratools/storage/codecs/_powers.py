"""Powers of two as scales of small blocks (OCP Microscaling): which one fits the numbers."""

from __future__ import annotations

import numpy as np

from loratools.storage.codecs._levels import Levels
from loratools.storage.codecs.floats import Array


def exponents(blocks: Array, levels: Levels) -> Array:
    """Return the bytes of the scales, 127 + e, for blocks (…, n) of numbers.

    Of floor(log2 max|w|) - floor(log2 largest level), the rule of the format, by which the largest numbers may be cut
    off, and the next power, that is taken by which the squared error is smaller; the rule's where they are equal.
    """
    largest = np.abs(blocks).max(axis=-1)
    _, power = np.frexp(largest)
    lower = power - 1 - int(np.log2(levels.most))
    errors = [_error(blocks, lower + step, levels) for step in (0, 1)]
    chosen = lower + (errors[1] < errors[0])
    return np.where(largest > 0, np.clip(chosen + 127, 0, 254), 0).astype(np.uint8)


def _error(blocks: Array, power: Array, levels: Levels) -> Array:
    x = np.ldexp(blocks, -power[..., None])
    x -= levels.table[levels.codes(x)]
    error: Array = np.square(x, dtype=np.float64).sum(axis=-1) * 4.0**power
    return error
