"""The numbers that small codes stand for: FP8 (OCP E4M3, E5M2), powers of two (E8M0), FP4 (E2M1), each as a table.

E4M3 has no infinity: 0x7F and 0xFF are NaN. E8M0 is 2^(byte − 127), 255 is NaN (OCP Microscaling Formats v1.0).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from loratools.storage.codecs.floats import Array, widen

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""FP4 by its code."""


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitude = np.where(exponent, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


@cache
def table(dtype: str) -> Array:
    """Return the 256 numbers of an 8-bit float dtype, by code; raise `ValueError` for a dtype that is none."""
    if dtype == "F8_E4M3":
        numbers = _minifloat(4, 3, 7)
        numbers[[0x7F, 0xFF]] = np.nan
    elif dtype == "F8_E5M2":
        numbers = _minifloat(5, 2, 15)
        for sign, code in ((1, 0x7C), (-1, 0xFC)):
            numbers[code], numbers[code + 1 : code + 4] = sign * np.inf, np.nan
    elif dtype == "F8_E4M3FNUZ":
        numbers = _minifloat(4, 3, 8)
        numbers[0x80] = np.nan
    elif dtype == "F8_E5M2FNUZ":
        numbers = _minifloat(5, 2, 16)
        numbers[0x80] = np.nan
    elif dtype == "F8_E8M0":
        numbers = (2.0 ** (np.minimum(np.arange(256), 254) - 127.0)).astype(np.float32)
        numbers[255] = np.nan
    else:
        raise ValueError(f"{dtype} is no 8-bit float dtype")
    numbers.setflags(write=False)
    return numbers


def numbers(stored: Array, dtype: str) -> Array:
    """Return stored floats of any dtype in float32: BF16 and 8-bit floats from their bits."""
    if dtype in ("BF16", "F16", "F32", "F64"):
        return widen(stored, dtype, np.float32) if dtype == "BF16" else stored.astype(np.float32)
    return table(dtype)[stored]
