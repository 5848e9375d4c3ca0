"""`codes.c`: what the codes of frequent schemes stand for, (table[code] - zero)·scale in float32, as NumPy has it.

It is compiled when the package is installed, where there is a C compiler. Functions say False where it is not there, or
not made for such arrays; then the formula in NumPy does the same, byte for byte, several times slower.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libcodes.so")
FORMS = {"low first": 0, "high first": 1, "bytes": 2, "I8": 3, "F8_E4M3": 4, "F8_E5M2": 5}
"""How codes lie: nibbles, the first in the low or the high half of a byte; bytes; bytes whose table is that dtype's."""

_NARROWEST = 16  # columns of a group, from which on C is worth its call


class _Codes(ctypes.Structure):
    """The same fields, in the same order, as `Codes` in codes.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "out")),
        *((name, ctypes.c_size_t) for name in ("form", "rows", "columns", "pitch", "width", "groups")),
        *((name, ctypes.c_void_p) for name in ("table", "scales", "zeros")),
    )


@cache
def _library() -> Any:
    """Return the compiled library, or None where there is none, or one of another codes.c."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not compiled here
        return None
    library.loratools_codes_size.restype = library.loratools_codes_width.restype = ctypes.c_size_t
    if library.loratools_codes_size() != ctypes.sizeof(_Codes):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.loratools_decode.argtypes = [ctypes.POINTER(_Codes), size]
    library.loratools_split_blocks.argtypes = [pointer, size, pointer, pointer]
    library.loratools_turn_words.argtypes = [pointer, size, size, size, pointer]
    for function in (library.loratools_decode, library.loratools_split_blocks, library.loratools_turn_words):
        function.restype = None
    return library


def available() -> bool:
    """Tell whether the C code was compiled at installation."""
    return _library() is not None


def widths() -> list[int]:
    """Return the widths of vectors that this processor has, in float32 numbers, the widest first; all give one result.

    Empty where nothing was compiled.
    """
    library = _library()
    return [] if library is None else [width for width in (16, 8, 1) if width <= library.loratools_codes_width()]


def decode(
    stored: Array, form: str, table: Array, out: Array, *, scales: Array | None = None, zeros: Array | None = None,
    width: int | None = None, vector: int | None = None,
) -> bool:  # fmt: skip
    """Write (table[code] - zero)·scale of rows of codes, and return True; False where C is not made for them.

    Args:
        stored: Rows of codes, uint8 (n, bytes), of which each row is contiguous.
        form: How codes lie in them, one of `FORMS`.
        table: What each code stands for, float32 (16,) for nibbles or (256,).
        out: Where numbers go, float32 (n, columns).
        scales: The scale of each group, float32 (n, groups). Default: no scales.
        zeros: What is subtracted before that, float32 (n, groups); only with scales. Default: nothing.
        width: Columns of a group, the last of which may be shorter. Default: all.
        vector: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

    Raises:
        ValueError: Arrays do not go together.
    """
    library, (rows, columns) = _library(), out.shape
    width = width or columns
    if library is None or width < min(_NARROWEST, columns) or not out.flags.c_contiguous or out.dtype != np.float32:
        return False
    groups, nibbles = -(-columns // width), FORMS[form] < 2
    shapes = [array.shape for array in (scales, zeros) if array is not None]
    if (
        len(stored) != rows
        or stored.shape[1] < (-(-columns // 2) if nibbles else columns)
        or (zeros is not None and scales is None)
    ):
        raise ValueError(f"{stored.shape} bytes of codes are not those of {out.shape} numbers")
    if any(shape != (rows, groups) for shape in shapes) or table.shape != (16 if nibbles else 256,):
        raise ValueError(f"scales and zeros {shapes} are not ({rows}, {groups}), or the table is {table.shape}")
    if not out.size:
        return True
    if stored.strides[1] != 1 or stored.itemsize != 1:
        stored = np.ascontiguousarray(stored).view(np.uint8)
    kept = [None if array is None else np.ascontiguousarray(array, np.float32) for array in (table, scales, zeros)]
    call = _Codes(
        stored.ctypes.data, out.ctypes.data, FORMS[form], rows, columns, stored.strides[0], width, groups,
        *(None if array is None else array.ctypes.data for array in kept),
    )  # fmt: skip
    library.loratools_decode(ctypes.byref(call), vector or _widest())
    return True


@cache
def _widest() -> int:
    return widths()[0]


def split_blocks(blocks: Array) -> tuple[Array, Array] | None:
    """Take apart Q8_0's blocks of 34 bytes, uint8 (rows, 34·n): 32·n codes a row, and n scales a row, float32.

    None where nothing was compiled.
    """
    library = _library()
    if library is None:
        return None
    rows, count = len(blocks), blocks.shape[1] // 34
    blocks = np.ascontiguousarray(blocks)
    codes, scales = np.empty((rows, 32 * count), np.uint8), np.empty((rows, count), np.float16)
    library.loratools_split_blocks(blocks.ctypes.data, rows * count, codes.ctypes.data, scales.ctypes.data)
    return codes, scales.astype(np.float32)


def turned(words: Array, first: int, count: int) -> Array | None:
    """Return columns [first, first + count) of words of 32 bits, (n, columns), as rows of bytes, uint8 (count, 4·n).

    None where nothing was compiled, or words are others. Raises `ValueError` for columns that there are not.
    """
    library = _library()
    if library is None or words.itemsize != 4 or not words.flags.c_contiguous:
        return None
    if first < 0 or first + count > words.shape[1]:
        raise ValueError(f"{words.shape} words have no columns from {first} to {first + count}")
    out = np.empty((count, len(words)), np.uint32)
    stride = words.shape[1]
    library.loratools_turn_words(words.ctypes.data + 4 * first, stride, len(words), count, out.ctypes.data)
    return out.view(np.uint8)
