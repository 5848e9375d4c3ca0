"""`residual.c`: predictions of the base from a merged tile, and what tells the base from them, as NumPy has it.

It is compiled when the package is installed, where there is a C compiler. `available` says whether it is there; what it
gives are the bytes of the formulas in NumPy (`engine/residual`), many times sooner.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from loratools.linalg.native import loaded

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libresidual.so")
LANES, CHUNK, MOST_ROWS, MOST_PLANES = 32, 64, 8, 23  # as in residual.c, all of them
DTYPES = {"BF16": 0, "F16": 1, "F32": 2}
SPARSE, DENSE = 0, 1
_MORE = 16  # bytes that are touched beyond bits
_SPECIAL, _MISFIT = 1, 2
_LARGEST = 2.0**20  # norms up to which the bound of the error in float32 is one


class _Step(ctypes.Structure):
    """The same fields, in the same order, as `Step` in residual.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("first", "last", "every", "begin", "end", "rank")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "near_left", "near_right")),
        *((name, ctypes.c_void_p) for name in ("row_error", "panel_error", "by_row", "by_column")),
    )


class _Tile(ctypes.Structure):
    """The same fields, in the same order, as `Tile` in residual.c, where they are explained."""

    _fields_ = (
        ("steps", ctypes.c_void_p),
        ("many", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("after", "W", "P")),
        *((name, ctypes.c_size_t) for name in ("source", "dtype", "start", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("numbers", "doubts", "above", "planes")),
        ("room", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("notes", "at", "high", "packed")),
        ("packed_bytes", ctypes.c_size_t),
        ("raw", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("form", "exceptions")),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    sizes = {"step_size": _Step, "tile_size": _Tile}
    return loaded.load(LIBRARY, "residual_width", sizes, ("encode", "decode"))


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def widths() -> list[int]:
    """Return the widths of vectors that this processor has, in float32 numbers, the widest first; all give one result.

    Empty where nothing serves.
    """
    return loaded.widths(_library()[1])


class _Memory(local):
    """The memory of one thread, kept from tile to tile: new memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def of(self, name: str, count: int, dtype: Any) -> Array:
        """Return an array under a name; what it held is lost."""
        held = self._held.get(name)
        if held is None or len(held) < count or held.dtype != dtype:
            self._held[name] = held = np.empty(count, dtype)
        return held[:count] if len(held) != count else held


_memory = _Memory()


def _at(array: Array | None) -> int | None:
    """Return the address of an array's first number; `array.ctypes` takes four times as long."""
    return None if array is None else array.__array_interface__["data"][0]


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """left·right on a rectangle of a matrix, as the C code takes it. See `product`."""

    call: _Step
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
    return Product(_Step(*rows, *columns, rank, *map(_at, arrays)), arrays)


def _panels(right: Array) -> Array:
    """Return right (k, columns) in panels of LANES columns, the last filled up with zeros."""
    rank, columns = right.shape
    count = -(-columns // LANES)
    padded = np.zeros((rank, count * LANES))
    padded[:, :columns] = right
    return np.ascontiguousarray(padded.reshape(rank, count, LANES).transpose(1, 0, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What tells a tile of the base from its predictions: the low bits of all `ranks`, plane after plane, and the rest.

    `high` are the bits beyond those, at the places `at`, in order; `raw` has them as they are compressed, None where
    there are so many that they are listed for every element. All but `ranks` and `raw` are in memory that this thread's
    next tile overwrites.
    """

    ranks: bytes
    raw: bytes | None
    at: Array
    high: Array


class Coder:
    """Codes tiles of one matrix and reads them; one thread at a time."""

    def __init__(self, products: Sequence[Product], columns: int, source: str, dtype: str) -> None:
        """Take what is to be taken back from merged numbers of dtype `source` to come near the base's, of `dtype`.

        `products` are in the order in which they were added; the matrix has so many columns. Dtypes are those of
        `DTYPES`. Raises `ValueError` for a product that reaches beyond the matrix.
        """
        if any(part.call.end > columns for part in products):
            raise ValueError(f"a product reaches beyond a matrix of {columns} columns")
        self._products = tuple(products)
        self._steps = (_Step * len(products))(*(part.call for part in products))
        self._columns, self._room = columns, -1
        self._types = tuple(np.dtype(np.uint32 if name == "F32" else np.uint16) for name in (source, dtype))
        self._tile = _Tile(
            steps=ctypes.addressof(self._steps), many=len(self._steps), source=DTYPES[source], dtype=DTYPES[dtype]
        )
        self._call = ctypes.byref(self._tile)
        self._held: dict[str, Array] = {}

    def _lay_out(self, after: Array, W: Array | None, start: int) -> _Tile:
        """Return the call for the rows from `start` on, with memory for it."""
        count, columns, tile = len(after), self._columns, self._tile
        if after.dtype != self._types[0] or (W is not None and (W.dtype, len(W)) != (self._types[1], count)):
            raise ValueError(f"tiles of {after.dtype} and {W if W is None else W.dtype} are not those of the tensors")
        if count % max(1, columns):
            raise ValueError(f"{count} numbers are not whole rows of {columns}")
        if count > self._room:
            self._make_room(count)
        tile.after, tile.W = _at(after), _at(W)
        if self._products:
            tile.start, tile.rows, tile.columns = start, count // columns if columns else 0, columns
        else:  # nothing is said of rows
            tile.start, tile.rows, tile.columns = 0, 1, count
        return tile

    def _make_room(self, count: int) -> None:
        """Take this thread's memory for tiles of so many numbers."""
        tile, columns = self._tile, self._columns if self._products else count
        padded, words = -(-columns // CHUNK) * CHUNK, -(-columns // CHUNK)
        rows, self._room, tile.room = max(count // max(1, columns), MOST_ROWS), count, count // 8 + _MORE
        for name, size, dtype in (
            ("P", count, self._types[1]), ("numbers", MOST_ROWS * padded, np.float32),
            ("doubts", 3 * MOST_ROWS * (padded // LANES + 1), np.uint32), ("above", rows * words, np.uint64),
            ("planes", MOST_PLANES * tile.room, np.uint8), ("notes", (MOST_PLANES + 1) * rows * words, np.uint64),
            ("at", count, np.uint32), ("high", count, np.uint32),
            ("packed", MOST_PLANES * tile.room, np.uint8), ("raw", count // 2 + _MORE, np.uint8),
        ):  # fmt: skip
            self._held[name] = array = _memory.of(name, size, np.dtype(dtype))
            setattr(tile, name, _at(array))

    def encode(self, W: Array, after: Array, start: int = 0, *, width: int | None = None) -> Coded | None:
        """Return what tells the base's rows from `start` on from their predictions.

        Args:
            W: Their bits, flat.
            after: The bits of what they became.
            start: The number of the first row. Default: the tile is the matrix.
            width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

        Returns:
            None where a prediction is NaN or infinite: then NumPy's formulas hold.
        """
        tile, held = self._lay_out(after, W, start), self._held
        tile.raw = _at(held["raw"])
        library, widest = _library()
        if library.loratools_encode(self._call, width or widest):
            return None
        count, dtype = tile.exceptions, self._types[1]
        raw = held["raw"][: count * (4 + dtype.itemsize)].tobytes() if tile.form == SPARSE else None
        return Coded(held["packed"][: tile.packed_bytes].tobytes(), raw, held["at"][:count], held["high"][:count])

    def decode(
        self, after: Array, ranks: Array, form: int, exceptions: int, raw: Array, start: int = 0, *,
        width: int | None = None,
    ) -> Array | None:  # fmt: skip
        """Return the bits of the base's rows from `start` on; in memory that this thread's next tile overwrites.

        Args:
            after: The bits of what they became.
            ranks: Low bits of all ranks, uint8, plane after plane.
            form: SPARSE or DENSE.
            exceptions: How many there are; where DENSE, as many as elements.
            raw: Exceptions as they are compressed, uint8: 4 bytes for the place of each where SPARSE, and the number.
            start: The number of the first row. Default: the tile is the matrix.
            width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

        Returns:
            None where a prediction is NaN or infinite, and where this does not fit the tile: NumPy's formulas say what
            holds.
        """
        size = self._types[1].itemsize + (4 if form == SPARSE else 0)
        if len(raw) != exceptions * size or exceptions > len(after) or (form == DENSE and exceptions != len(after)):
            raise ValueError(f"{len(raw)} bytes are not {exceptions} exceptions of {len(after)} elements")
        tile = self._lay_out(after, None, start)
        if len(ranks) > MOST_PLANES * tile.room - _MORE:
            return None
        self._held["packed"][: len(ranks)] = ranks
        tile.packed_bytes, tile.raw, tile.form, tile.exceptions = len(ranks), _at(raw), form, exceptions
        library, widest = _library()
        if library.loratools_decode(self._call, width or widest):
            return None
        return self._held["P"][: len(after)]
