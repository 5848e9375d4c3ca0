"""`residual.c`: predictions of the base from a merged tile, and what tells the base from them, as NumPy has it.

It is compiled when the package is installed, where there is a C compiler. `available` says whether it is there; what it
gives are the bytes of the formulas in NumPy (`engine/residual`), many times sooner.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libresidual.so")
_MOST = 23  # bits that one rank can take, of F32
LANES = MORE = 16  # as in residual.c, both
DTYPES = {"BF16": 0, "F16": 1, "F32": 2}


class _Step(ctypes.Structure):
    """The same fields, in the same order, as `Step` in residual.c, where they are explained."""

    _fields_ = (
        ("P", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("stride", "rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "by_row", "by_column")),
    )


class _Tile(ctypes.Structure):
    """The same fields, in the same order, as `Tile` in residual.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("prediction", "after", "W", "P")),
        *((name, ctypes.c_size_t) for name in ("dtype", "count")),
        *((name, ctypes.c_void_p) for name in ("places", "low", "spread")),
        ("coarse", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("at", "high")),
        *((name, ctypes.c_size_t) for name in ("exceptions", "special")),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not compiled here
        return None, 0
    for name in ("step_size", "tile_size", "residual_width", "pack"):
        getattr(library, f"loratools_{name}").restype = ctypes.c_size_t
    if (library.loratools_step_size(), library.loratools_tile_size()) != (ctypes.sizeof(_Step), ctypes.sizeof(_Tile)):
        return None, 0  # of another residual.c
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.loratools_widen.argtypes = [pointer, size, size, pointer, size]
    library.loratools_take_back.argtypes = library.loratools_scan.argtypes = [pointer, size]
    library.loratools_place.argtypes = [pointer, size]
    library.loratools_pack.argtypes = [*[pointer] * 4, size]
    library.loratools_unpack.argtypes = [pointer] * 3
    for name in ("widen", "take_back", "scan", "place", "unpack"):
        getattr(library, f"loratools_{name}").restype = None
    return library, int(library.loratools_residual_width())


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def widths() -> list[int]:
    """Return the widths of vectors that this processor has, in float32 numbers, the widest first; all give one result.

    Empty where nothing serves.
    """
    return [width for width in (16, 8, 4) if width <= _library()[1] and (width > 4 or _library()[1] == 4)]


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


def widened(bits: Array, dtype: str, *, width: int | None = None) -> Array:
    """Return stored numbers, flat, in float32; in memory that the next call of this thread overwrites."""
    out = _memory.of("prediction", len(bits), np.float32)
    library, widest = _library()
    library.loratools_widen(_at(bits), len(bits), DTYPES[dtype], _at(out), width or widest)
    return out


def panels(right: Array) -> Array:
    """Return right (k, columns), float64, in panels of 16 columns, the last filled up with zeros."""
    rank, columns = right.shape
    count = -(-columns // LANES)
    padded = np.zeros((rank, count * LANES))
    padded[:, :columns] = right
    return np.ascontiguousarray(padded.reshape(rank, count, LANES).transpose(1, 0, 2))


def take_back(
    P: Array, left: Array, right: Array, *, by_row: Array | None = None, by_column: Array | None = None,
    width: int | None = None,
) -> None:  # fmt: skip
    """Turn P into P / g − left·right, in place.

    Args:
        P: Numbers in float32, (n, columns), each row contiguous.
        left: Float64, (n, k); its products with right, and their sums, must be exact in float64.
        right: What `panels` made of the right factor, (k, columns).
        by_row: g of each row, float32 (n,). Default: none.
        by_column: g of each column, float32 (columns,). Default: none.
        width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

    Raises:
        ValueError: Arrays do not go together.
    """
    rows, columns = P.shape
    if not P.size:
        return
    lengths = [(rows, by_row), (columns, by_column)]
    alike = left.shape == (rows, right.shape[1]) and len(right) == -(-columns // LANES)
    if not alike or any(g is not None and (g.shape != (n,) or g.dtype != np.float32) for n, g in lengths):
        raise ValueError(f"P {P.shape}, left {left.shape}, right {right.shape} and g do not go together")
    if P.dtype != np.float32 or P.strides[1] != 4 or P.strides[0] % 4:
        raise ValueError(f"P {P.dtype} {P.shape} with steps {P.strides} is not rows of float32")
    left, right = np.ascontiguousarray(left, np.float64), np.ascontiguousarray(right, np.float64)
    gains = [None if g is None else np.ascontiguousarray(g) for _, g in lengths]
    call = _Step(
        _at(P), P.strides[0] // 4, rows, columns, left.shape[1], _at(left), _at(right),
        *map(_at, gains),
    )  # fmt: skip
    library, widest = _library()
    library.loratools_take_back(ctypes.byref(call), width or widest)


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What a tile's predictions leave open; in memory that this thread's next scan overwrites.

    `places` are where W' lies in a higher binade than the prediction, `spread` how many bits of the rank are open there
    and `low` those bits; `at` are places where the rank has more than that, and `high` those bits. `P` are the bits of
    the rounded predictions.
    """

    tile: _Tile
    P: Array
    spread: Array
    at: Array
    high: Array

    def packed(self, *, width: int | None = None) -> bytes:
        """Return the low bits of all ranks, plane after plane."""
        count = len(self.P) + MORE
        out = _memory.of("packed", _MOST * count // 8 + 1, np.uint8)
        low, spread = _memory.of("turn", count, np.uint32), _memory.of("turned spread", count, np.uint32)
        library, widest = _library()
        size = library.loratools_pack(ctypes.byref(self.tile), _at(out), _at(low), _at(spread), width or widest)
        return out[:size].tobytes()

    def place(self, packed: Array, at: Array, high: Array, *, width: int | None = None) -> Array:
        """Return the bits of W, given the `packed` low bits, uint8, and what the ranks have more: places, in order.

        `packed` has as many bits as `spread` says, and `at` and `high`, uint32, are of one length, within the tile.
        """
        library, widest = _library()
        turn = _memory.of("turn", len(self.P) + MORE, np.uint32)
        library.loratools_unpack(ctypes.byref(self.tile), _at(packed), _at(turn))
        self.tile.at, self.tile.high, self.tile.exceptions = _at(at), _at(high), len(at)
        library.loratools_place(ctypes.byref(self.tile), width or widest)
        return self.P


def scan(
    prediction: Array, after: Array | None, dtype: str, W: Array | None = None, *, width: int | None = None
) -> Scan | None:
    """Compare a tile's predictions, float32 and flat, with what was merged and, where it is known, with the base.

    Args:
        prediction: W' − ΔW before it is rounded.
        after: Bits of the merged numbers, where their dtype is the base's; None where it is another.
        dtype: Of the base: BF16, F16 or F32.
        W: Bits of the base. Default: they are wanted; only `P`, `places` and `spread` are found.
        width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

    Returns:
        None where a prediction is NaN or infinite: then NumPy's formulas hold.
    """
    count, itemsize = len(prediction), 4 if dtype == "F32" else 2
    unsigned = np.uint32 if dtype == "F32" else np.uint16
    P = _memory.of(f"P{itemsize}", count, unsigned)
    room = count + MORE
    places, low, at, high = (_memory.of(name, room, np.uint32) for name in ("places", "low", "at", "high"))
    spread = _memory.of("spread", room, np.uint8)
    tile = _Tile(
        _at(prediction), _at(after), _at(W), _at(P), DTYPES[dtype], count,
        _at(places), _at(low), _at(spread), 0, _at(at), _at(high), 0, 0,
    )  # fmt: skip
    library, widest = _library()
    library.loratools_scan(ctypes.byref(tile), width or widest)
    if tile.special:
        return None
    return Scan(tile, P, spread[: tile.coarse], at[: tile.exceptions], high[: tile.exceptions])
