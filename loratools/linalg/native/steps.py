"""What residual.c takes back from merged numbers: products left·right on rectangles of a matrix."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LANES = 32  # columns of a panel, as in residual.c
_LARGEST = 2.0**20  # norms up to which the bound of the error in float32 is one


class Step(ctypes.Structure):
    """The same fields, in the same order, as `Step` in residual.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("first", "last", "every", "begin", "end", "rank")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "near_left", "near_right")),
        ("held", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("row_error", "panel_error", "by_row", "by_column")),
    )


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
    gains = [(height, by_row), (width, by_column)]
    alike = left.shape == (height, rank) and right.shape == (rank, width)
    if not alike or any(g is not None and (g.shape != (n,) or g.dtype != np.float32) for n, g in gains):
        raise ValueError(f"rows {rows}, columns {columns}, left {left.shape}, right {right.shape} and g do not fit")
    if min(*rows, columns[0], width) < 0 or rows[2] < 1:
        raise ValueError(f"rows {rows} and columns {columns} are no rectangle")
    left, panels = np.ascontiguousarray(left, np.float64), _panels(right)
    norms = np.sqrt(np.einsum("ij,ij->i", left, left)), np.sqrt(np.square(panels).sum(1).max(1, initial=0))
    near: tuple[Array | None, ...] = (None,) * 4
    held = False
    if all(norm.max(initial=0) < _LARGEST for norm in norms):
        # k sums and the exact one are rounded, by at most 2^-24 of |left|·|right| each, and so are factors that float32
        # does not hold; 1 more is for what is of second order.
        near_left, near_panels = left.astype(np.float32), panels.astype(np.float32)
        held = bool((near_left == left).all() and (near_panels == panels).all())
        errors = norms[0] * (rank + (2 if held else 4)) * 2.0**-24 * 1.01, norms[1] * 1.01
        smallest = np.finfo(np.float32).tiny
        bounds = [np.where(error > 0, np.maximum(error, smallest), 0).astype(np.float32) for error in errors]
        near = (near_left, near_panels, *bounds)
    arrays = (left, panels, *near, *(None if g is None else np.ascontiguousarray(g) for _, g in gains))
    places = [*map(address, arrays)]
    return Product(Step(*rows, *columns, rank, *places[:4], held, *places[4:]), arrays)


def _panels(right: Array) -> Array:
    """Return right (k, columns) in panels of LANES columns, the last filled up with zeros."""
    rank, columns = right.shape
    count = -(-columns // LANES)
    padded = np.zeros((rank, count * LANES))
    padded[:, :columns] = right
    return np.ascontiguousarray(padded.reshape(rank, count, LANES).transpose(1, 0, 2))
