"""`residual.c`: predictions of the base from a merged tile, and what tells the base from them, as NumPy has it.

It is compiled when the package is installed, where there is a C compiler. `available` says whether it is there; what it
gives are the bytes of the formulas in NumPy (`engine/residual`), many times sooner.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import Any

import numpy as np

from loratools.linalg.native import loaded, steps
from loratools.linalg.native.steps import LANES, LIBRARY, Product, Step, address

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK, MOST_ROWS, MOST_PLANES = 64, 8, 23  # as in residual.c, all of them
DTYPES = {"BF16": 0, "F16": 1, "F32": 2}
SPARSE, DENSE, LISTED = range(3)
FEW = 1024
_MORE = 16  # bytes that are touched beyond bits
_LONGEST = 10  # bytes of an exception that is LISTED, at most
_HEADS = 17  # bytes of a block beside its ranks and exceptions
_SPECIAL, _MISFIT = 1, 2


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
        *((name, ctypes.c_size_t) for name in ("raw_bytes", "form", "exceptions")),
    )


class _Blocks(ctypes.Structure):
    """The same fields, in the same order, as `Blocks` in residual.c."""

    _fields_ = (
        ("tile", ctypes.c_void_p),
        ("tiles", ctypes.c_size_t),
        ("to", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("room", "bytes")),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    sizes = {"step_size": Step, "tile_size": _Tile, "blocks_size": _Blocks}
    library, widest = loaded.load(LIBRARY, "residual_width", sizes, ("encode", "encode_blocks", "decode"))
    return (library, widest) if steps.serves() else (None, 0)


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


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What tells a tile of the base from its predictions: the low bits of all `ranks`, plane after plane, and the rest.

    `high` are the bits beyond those, at the places `at`, in order; `form` says how they are listed, and `raw` has them
    so; None where they are DENSE, listed for every element. All but `ranks` and `raw` are in memory that this thread's
    next tile overwrites.
    """

    ranks: bytes
    form: int
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
        self._steps = (Step * len(products))(*(part.call for part in products))
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
        tile.after, tile.W = address(after), address(W)
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
            ("packed", MOST_PLANES * tile.room, np.uint8),
            ("raw", max(count // 2, _LONGEST * min(count, FEW)) + _MORE, np.uint8),
        ):  # fmt: skip
            self._held[name] = array = _memory.of(name, size, np.dtype(dtype))
            setattr(tile, name, address(array))

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
        tile.raw = address(held["raw"])
        library, widest = _library()
        if library.loratools_encode(self._call, width or widest):
            return None
        count = tile.exceptions
        raw = None if tile.form == DENSE else held["raw"][: tile.raw_bytes].tobytes()
        ranks = held["packed"][: tile.packed_bytes].tobytes()
        return Coded(ranks, tile.form, raw, held["at"][:count], held["high"][:count])

    def blocks(self, W: Array, after: Array, start: int, height: int, *, width: int | None = None) -> tuple[bytes, int]:
        """Return blocks of tiles of `height` rows as `engine/residual` frames them, after their lengths, and how many.

        They end before a tile that `encode` returns None for, or whose exceptions are not LISTED.

        Args:
            W: The bits of the base's rows from `start` on, flat: those of whole tiles.
            after: The bits of what they became.
            start: The number of the first row.
            height: Rows of a tile.
            width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

        Raises:
            ValueError: Arrays do not go together.
        """
        size = height * self._columns
        if len(W) != len(after) or not size or len(W) % size:
            raise ValueError(f"{len(W)} and {len(after)} numbers are not whole tiles of {size}")
        tile = self._lay_out(after[:size], W[:size], start)
        to = _memory.of("blocks", 2 * (MOST_PLANES * tile.room + len(self._held["raw"]) + _HEADS), np.dtype(np.uint8))
        tile.raw = address(self._held["raw"])
        call = _Blocks(ctypes.addressof(tile), len(W) // size, address(to), len(to))
        library, widest = _library()
        done = library.loratools_encode_blocks(ctypes.byref(call), width or widest)
        return to[: call.bytes].tobytes(), int(done)

    def decode(
        self, after: Array, ranks: Array, form: int, exceptions: int, raw: Array, start: int = 0, *,
        width: int | None = None,
    ) -> Array | None:  # fmt: skip
        """Return the bits of the base's rows from `start` on; in memory that this thread's next tile overwrites.

        Args:
            after: The bits of what they became.
            ranks: Low bits of all ranks, uint8, plane after plane.
            form: SPARSE, DENSE or LISTED.
            exceptions: How many there are; where DENSE, as many as elements.
            raw: Exceptions as they are compressed, uint8: 4 bytes for the place of each where SPARSE, and the number;
                where LISTED as they are written.
            start: The number of the first row. Default: the tile is the matrix.
            width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

        Returns:
            None where a prediction is NaN or infinite, and where this does not fit the tile: NumPy's formulas say what
            holds.
        """
        size = self._types[1].itemsize + (4 if form == SPARSE else 0)
        fits = form == LISTED or len(raw) == exceptions * size
        if not fits or exceptions > len(after) or (form == DENSE and exceptions != len(after)):
            raise ValueError(f"{len(raw)} bytes are not {exceptions} exceptions of {len(after)} elements")
        tile = self._lay_out(after, None, start)
        if len(ranks) > MOST_PLANES * tile.room - _MORE:
            return None
        self._held["packed"][: len(ranks)] = ranks
        tile.packed_bytes, tile.form, tile.exceptions = len(ranks), form, exceptions
        tile.raw, tile.raw_bytes = address(raw), len(raw)
        library, widest = _library()
        if library.loratools_decode(self._call, width or widest):
            return None
        return self._held["P"][: len(after)]
