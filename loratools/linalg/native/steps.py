"""What residual.c takes back from merged numbers: products left·right on rectangles of a matrix, in fixed point.

`fixed.h` has the code, which is part of the library of residual.c.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loratools.linalg.native import loaded

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libresidual.so")
LANES = 32  # columns of a panel, as in residual.c


class Step(ctypes.Structure):
    """The same fields, in the same order, as `Step` in residual.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("first", "last", "every", "begin", "end", "rank")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "near_left", "near_right")),
        ("held", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("row_error", "panel_error", "by_row", "by_column")),
    )


class _Factor(ctypes.Structure):
    """The same fields, in the same order, as `Factor` in residual.c."""

    _fields_ = (
        ("factor", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "bits", "across")),
        ("scales", ctypes.c_void_p),
    )


class _Factors(ctypes.Structure):
    """The same fields, in the same order, as `Factors` in residual.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right")),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("panels", "near_left", "near_panels", "row_error", "panel_error")),
        ("held", ctypes.c_size_t),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    sizes = {"step_size": Step, "factor_size": _Factor, "factors_size": _Factors}
    return loaded.load(LIBRARY, "residual_width", sizes, ("fix", "lay_out"))


def serves() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def address(array: Array | None) -> int | None:
    """Return the address of an array's first number; `array.ctypes` takes four times as long."""
    return None if array is None else array.__array_interface__["data"][0]


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """left·right on a rectangle of a matrix, as the C code takes it. See `product`."""

    call: Step
    arrays: tuple[Array | None, ...]


def product(
    rows: tuple[int, int, int], columns: tuple[int, int], left: Array, right: Array, *, by_row: Array | None = None,
    by_column: Array | None = None,
) -> Product:  # fmt: skip
    """Prepare P / g − left·right on a rectangle of a matrix.

    Args:
        rows: The first row, the end, and the step from each to the next.
        columns: The first column and the end.
        left: Float64, (rows, k); its products with right, and their sums, must be exact in float64.
        right: Float64, (k, columns).
        by_row: g of each row, float32 (rows,). Default: none.
        by_column: g of each column, float32 (columns,). Default: none.

    Raises:
        ValueError: Arrays do not go together.
    """
    height, width, rank = len(range(*rows)), columns[1] - columns[0], left.shape[1]
    sides = [(height, by_row), (width, by_column)]
    alike = left.shape == (height, rank) and right.shape == (rank, width)
    if not alike or any(g is not None and (g.shape != (n,) or g.dtype != np.float32) for n, g in sides):
        raise ValueError(f"rows {rows}, columns {columns}, left {left.shape}, right {right.shape} and g do not fit")
    if min(*rows, columns[0], width) < 0 or rows[2] < 1:
        raise ValueError(f"rows {rows} and columns {columns} are no rectangle")
    left, right = np.ascontiguousarray(left, np.float64), np.ascontiguousarray(right, np.float64)
    count = -(-width // LANES)
    panels, near_panels = np.empty((count, rank, LANES)), np.empty((count, rank, LANES), np.float32)
    near = (np.empty(left.shape, np.float32), near_panels, np.empty(height, np.float32), np.empty(count, np.float32))
    call = _Factors(address(left), address(right), height, width, rank, address(panels), *map(address, near))
    library, widest = _library()
    bounded = library.loratools_lay_out(ctypes.byref(call), widest)
    gains = tuple(None if g is None else np.ascontiguousarray(g) for g in (by_row, by_column))
    factors = [address(left), address(panels), *(map(address, near[:2]) if bounded else (None, None)), call.held]
    errors = [*(map(address, near[2:]) if bounded else (None, None))]
    return Product(Step(*rows, *columns, rank, *factors, *errors, *map(address, gains)), (left, panels, *near, *gains))


def fix(factor: Array, bits: int, axis: int, *, width: int | None = None) -> bool:
    """Round each row, or column, to multiples of 2^-bits of the power of two above its largest number, in place.

    Args:
        factor: Float64, (rows, columns), in C's order; finite.
        bits: How many bits the largest number keeps, at most 52.
        axis: 1 for rows, 0 for columns.
        width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

    Returns:
        False where nothing was changed: nothing serves, or one of these powers of two is no float64.
    """
    library, widest = _library()
    if not widest or factor.dtype != np.float64 or not factor.flags.c_contiguous or not factor.flags.writeable:
        return False
    rows, columns = factor.shape
    scales = np.empty(2 * (rows if axis else columns))
    call = _Factor(address(factor), rows, columns, bits, axis, address(scales))
    return bool(library.loratools_fix(ctypes.byref(call), width or widest))
