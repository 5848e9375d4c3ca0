"""Stored factors arranged for the C code, in memory that is used again from tensor to tensor, without NumPy.

`factors.h` has the code, which is part of the library of `rows.c`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

from loratools.linalg import native
from loratools.parallel.memory import Room

_DTYPES = {"BF16": 0, "F16": 1, "F32": 2}
_ALIGNED = 64  # bytes of the widest vectors, which are fastest where none lies in two lines of the cache
_DOUBLE, _SINGLE = 8, 4


@dataclass(slots=True, eq=False)
class Piece:
    """Some memory: where it is, and what is in it."""

    address: int
    view: memoryview


class Memory:
    """The memory of one worker thread by names: under the same name the same again, or more where that is needed."""

    def __init__(self) -> None:
        self._held: dict[str, Room] = {}

    def of(self, name: str, nbytes: int, read: int | None = None, write: int | None = None) -> Piece:
        """Return so many bytes under a name, at the `place` for a read or a write; what they held is lost."""
        view = self._held.setdefault(name, Room()).of(nbytes, read, write)
        return Piece(ctypes.addressof(ctypes.c_char.from_buffer(view)) if nbytes else 0, view)


@dataclass(slots=True, eq=False)
class Matrix:
    """A stored matrix of a dtype (BF16, F16 or F32, as safetensors has them): of (i, j) the number i·down + j·across.

    `raw` has `count` numbers, and the matrix begins at number `first` of them.
    """

    raw: Piece
    dtype: str
    shape: tuple[int, int]
    count: int
    first: int
    down: int
    across: int

    @classmethod
    def of(cls, raw: Piece, dtype: str, shape: tuple[int, ...]) -> Matrix:
        """See bytes in C order as a matrix: first side × all others."""
        rows = shape[0] if shape else 1
        count = 1
        for side in shape:
            count *= side
        columns = count // rows if rows else 0
        return cls(raw, dtype, (rows, columns), count, 0, columns, 1)

    @property
    def T(self) -> Matrix:
        """The matrix with rows and columns exchanged."""
        return replace(self, shape=self.shape[::-1], down=self.across, across=self.down)

    def rows(self, part: slice) -> Matrix:
        """Return rows of the matrix, which follow each other."""
        start, stop, _ = part.indices(self.shape[0])
        return replace(self, shape=(stop - start, self.shape[1]), first=self.first + start * self.down)

    @property
    def widened(self) -> int:
        """Bytes of memory that C needs to have the numbers in float32: none where they are."""
        return 0 if self.dtype == "F32" else _SINGLE * self.count

    def _for_c(self) -> _Matrix:
        number = _DTYPES[self.dtype]
        return _Matrix(self.raw.address, number, self.count, self.first, self.down, self.across)


class _Matrix(ctypes.Structure):
    """The same fields, in the same order, as `Matrix` in factors.h."""

    _fields_ = (
        ("raw", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("dtype", "count", "first", "down", "across")),
    )


class _Sum(ctypes.Structure):
    """The same fields, in the same order, as `Sum` in factors.h."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("factor", "left", "right", "scale", "magnitude")),
    )


def available() -> bool:
    """Tell whether the C code is there."""
    library = native.library()
    if library is None:
        return False
    size: int = library.loratools_sum_size()
    return size == ctypes.sizeof(_Sum) + ctypes.sizeof(_Matrix)


class Sum:
    """Σ scale·left·right over products on one rectangle, left (rows, k) and right (k, columns), filled in one by one.

    It lies in `memory` of `Sum.nbytes` bytes. With `rescaled` there is a magnitude for each row.
    """

    def __init__(self, rows: int, columns: int, rank: int, memory: Piece, *, rescaled: bool) -> None:
        self.rows, self.columns, self.rank = rows, columns, rank
        self._held = memory
        addresses, at = {}, memory.address
        for name, nbytes in _parts(rows, columns, rank, rescaled).items():
            addresses[name], at = at, at + _rounded(nbytes)
        self.gains = addresses.pop("gains", None)
        self._sum = _Sum(rows, columns, rank, **addresses)
        self._filled = 0

    @staticmethod
    def nbytes(rows: int, columns: int, rank: int, *, rescaled: bool) -> int:
        """Return the memory that a sum takes."""
        return sum(map(_rounded, _parts(rows, columns, rank, rescaled).values()))

    def add(self, left: Matrix, right: Matrix, scale: float, scratch: Memory) -> bool:
        """Add scale·left·right; tell whether all their numbers are finite.

        Raises `ValueError` for matrices that do not fit.
        """
        count = left.shape[1]
        end = self._filled + count
        if (left.shape[0], right.shape) != (self.rows, (count, self.columns)) or end > self.rank:
            sizes = f"{(self.rows, self.rank)} x {self.columns} from {self._filled} on"
            raise ValueError(f"{left.shape} x {right.shape} do not fit into {sizes}")
        room = scratch.of("numbers", max(left.widened, right.widened))
        ok = native.library().loratools_add_factors(
            ctypes.byref(self._sum), ctypes.byref(left._for_c()), ctypes.byref(right._for_c()),
            ctypes.c_size_t(self._filled), ctypes.c_size_t(count), ctypes.c_double(scale),
            ctypes.c_void_p(room.address),
        )  # fmt: skip
        self._filled = end
        return bool(ok)

    def rescale(self, magnitudes: Matrix, scratch: Memory) -> bool:
        """Set the magnitude of each row, a matrix with one column; tell whether all are finite."""
        if magnitudes.shape != (self.rows, 1):
            raise ValueError(f"{magnitudes.shape} are not magnitudes of {self.rows} rows")
        room = scratch.of("numbers", magnitudes.widened)
        ok = native.library().loratools_set_magnitudes(
            ctypes.byref(self._sum), ctypes.byref(magnitudes._for_c()), ctypes.c_void_p(room.address)
        )
        return bool(ok)

    def bound(self) -> float:
        """Return a bound of the magnitudes of left·right, by the norms of their rows and columns."""
        norm: float = native.library().loratools_bound(ctypes.byref(self._sum))
        return norm

    @property
    def sums(self) -> int:
        """Bytes of the sums that a call with it needs memory for."""
        return _SINGLE * (native.MOST_ROWS + 2) * _panels(self.columns)

    def pointers(self) -> dict[str, Any]:
        """Return the fields of `native.Rows` that are the sum's."""
        at = self._sum
        return {
            "columns": self.columns, "rank": self.rank, "left": at.left, "right": at.right, "factor": at.factor,
            "scale": at.scale, "magnitude": at.magnitude, "gains": self.gains,
        }  # fmt: skip


def _panels(columns: int) -> int:
    return -(-columns // native.LANES) * native.LANES


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _parts(rows: int, columns: int, rank: int, rescaled: bool) -> dict[str, int]:
    """Return the bytes of each array of a sum."""
    left = _SINGLE * rows * rank
    parts = {"factor": left, "left": left, "right": _SINGLE * rank * _panels(columns), "scale": _DOUBLE * rank}
    return parts | ({"magnitude": _DOUBLE * rows, "gains": _DOUBLE * rows} if rescaled else {})
