"""Numbers rounded to 8-bit floats, and the scales by which they fill that dtype's range, as each library makes them.

by_quotient    scale = max|block| / largest, codes are W / scale     compressed-tensors, modelopt, fbgemm
by_factor      factor = largest / max|block|, scale = 1 / factor     transformers
by_inverse     scale = max|block| / largest, codes are W · 1/scale   ComfyUI
by_power       scale = the least power of two of at least max|block| / largest: MXFP8, scales in E8M0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from loratools.storage import dtypes
from loratools.storage.codecs.floats import Array, narrow
from loratools.storage.codecs.tables import numbers, table

POWERS = ("F8_E8M0", "U8")
"""The dtypes of scales that are powers of two."""

Rule = Callable[[Array, float], "tuple[Array, Array | None]"]
"""Makes scales of the largest magnitudes of blocks and the largest number of the codes' dtype: the scales, and what W
is multiplied by before it is rounded; None: W is divided by the scales as they are stored."""


def by_quotient(most: Array, largest: float) -> tuple[Array, Array | None]:
    """Return most / largest, 1 for a block of zeros."""
    return np.where(most == 0, np.float32(1), most / np.float32(largest)), None


def by_factor(most: Array, largest: float) -> tuple[Array, Array | None]:
    """Return 1 / factor, and the factor, largest / most; 1 for a block of zeros."""
    inverse = np.float32(1) / np.where(most == 0, np.float32(largest), most)  # torch divides a number so: two roundings
    factor = np.where(most == 0, np.float32(1), inverse * np.float32(largest))
    return np.float32(1) / factor, factor


def by_inverse(most: Array, largest: float) -> tuple[Array, Array | None]:
    """Return most / largest, and its inverse; 1 for a block of zeros."""
    scale, _ = by_quotient(most, largest)
    return scale, np.float32(1) / scale


def by_power(most: Array, largest: float) -> tuple[Array, Array | None]:
    """Return the least power of two of at least most / largest, from 2^-127 to 2^127; 1 for a block of zeros."""
    fraction, exponent = np.frexp(by_quotient(most, largest)[0])
    return np.ldexp(np.float32(1), np.clip(exponent - (fraction == 0.5), -127, 127)).astype(np.float32), None


@cache
def largest(dtype: str) -> float:
    """Return the largest number of an 8-bit float dtype."""
    return float(max(number for number in table(dtype) if np.isfinite(number)))


@cache
def beyond(dtype: str) -> float:
    """Return the least number that would round to more than the largest of an 8-bit float dtype, if there were more."""
    numbers_of_it = np.unique(table(dtype)[np.isfinite(table(dtype))].astype(np.float64))
    return float(numbers_of_it[-1] + (numbers_of_it[-1] - numbers_of_it[-2]) / 2)


def rounded(x: Array, dtype: str, drawn: Array | None = None) -> Array:
    """Return numbers as codes: to the nearest, ties to even; beyond the largest number, that. x is spoiled.

    With `drawn`, numbers in [0, 1) of x's shape, a number between two neighbours goes to the one away from zero where
    what is drawn is less than its distance to the other, in steps between them: nothing is lost on average.
    """
    import torch

    most = np.float32(largest(dtype))
    np.clip(x, -most, most, out=x)
    twin = dtypes.to_torch(dtype)
    codes: Array = torch.from_numpy(x).to(twin).view(torch.uint8).numpy()
    if drawn is None:
        return codes
    magnitudes = np.abs(table(dtype)[:128])
    size = np.abs(x)
    below = codes & np.uint8(127)
    below -= magnitudes[below] > size
    low = magnitudes[below]
    step = _steps(dtype)[below]
    below += np.asarray(drawn, np.float32) * step < size - low
    signs = np.signbit(x) & (below != 0) if _has_one_zero(dtype) else np.signbit(x)
    return np.where(np.isnan(x), codes, below | (signs.astype(np.uint8) << 7)).astype(np.uint8)


@cache
def _steps(dtype: str) -> Array:
    """Return how far the next magnitude is, by the magnitude of an 8-bit float; at the end, the largest float32."""
    magnitudes = table(dtype)[:128].astype(np.float64)
    none = np.finfo(np.float32).max
    steps = np.diff(np.where(np.isfinite(magnitudes), magnitudes, none), append=none)
    return np.where(steps > 0, steps, none).astype(np.float32)


def _has_one_zero(dtype: str) -> bool:
    return dtype.endswith("FNUZ")


def stored(scales: Array, dtype: str) -> Array:
    """Return scales in the dtype in which they are stored; BF16 and 8-bit floats as their bits."""
    if dtype in POWERS:
        return (np.frexp(scales)[1] + 126).astype(np.uint8)
    bits = narrow(scales, dtype)
    return bits if dtype == "BF16" else bits.view(f"<f{bits.itemsize}")


def read_back(scales: Array, dtype: str) -> Array:
    """Return scales as they are read from the dtype in which they are stored."""
    return numbers(stored(scales, dtype), "F8_E8M0" if dtype == "U8" else dtype)
