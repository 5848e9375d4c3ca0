"""Tiles of a tensor, read from one file, changed as in `rows.c`, and written to another, in one call of C for each.

`tiles.h` has the code, which is part of the library of `rows.c`, where files are read and written at an offset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from loratools.linalg import native
from loratools.linalg.native.factors import Memory, Sum

_DTYPES = {"BF16": (0, 2), "F16": (1, 2), "F32": (2, 4)}  # number in C, bytes
_DONE, _READ_FAILED, _ENDED, _WRITE_FAILED, _NO_DIRECTION = range(5)


class _Place(ctypes.Structure):
    """The same fields, in the same order, as `Place` in tiles.h, where they are explained."""

    _fields_ = (*((name, ctypes.c_size_t) for name in ("first", "last", "step", "column")), ("products", native.Rows))


class _Tensor(ctypes.Structure):
    """The same fields, in the same order, as `Tensor` in tiles.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("source", "start", "target", "offset")),
        *((name, ctypes.c_size_t) for name in ("dtype", "columns")),
        *((name, ctypes.c_void_p) for name in ("stored", "made")),
        ("places", ctypes.POINTER(_Place)),
        *((name, ctypes.c_size_t) for name in ("count", "everywhere")),
        *((name, ctypes.c_int64) for name in ("zero_row", "ended")),
        *((name, ctypes.c_uint32) for name in ("largest", "error")),
        ("place", ctypes.c_size_t),
    )


def available() -> bool:
    """Tell whether the C code is there, and this system reads and writes files as it does."""
    library = native.library()
    if library is None or not hasattr(library, "loratools_pass_rows"):
        return False
    size: int = library.loratools_tensor_size()
    return size == ctypes.sizeof(_Tensor) + ctypes.sizeof(_Place)


@dataclass(slots=True, eq=False)
class Rectangle:
    """Rows × columns of a tensor, each (start, stop, step), and what is added there; `bound` is as in `rows.c`."""

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    products: Sum
    bound: float


@dataclass(slots=True, eq=False)
class Passed:
    """What a call met: the bits of the largest magnitude, a row without direction, the sums behind the retention.

    `zero_row` is the number of a rectangle and of its row.
    """

    largest: int
    zero_row: tuple[int, int] | None
    retained: float
    total: float
    changed: int


class Passage:
    """The way of one tensor, (rows, `columns`), from a file to another, by its rectangles, which do not meet.

    `everywhere` says that they are all of it. `stored` and `made` are the rows of a call, in the `memory` of a thread.
    """

    def __init__(
        self, places: Sequence[Rectangle], columns: int, dtype: str, memory: Memory, *, everywhere: bool
    ) -> None:  # fmt: skip
        number, size = _DTYPES[dtype]
        sums = memory.of("sums", max(each.products.sums for each in places))
        self.stored = self.made = memoryview(b"")
        self._memory, self._row = memory, columns * size
        self._places = (_Place * len(places))(*(_place(each, columns, number, sums.address) for each in places))
        self._tensor = _Tensor(
            dtype=number, columns=columns, places=self._places, count=len(places), everywhere=everywhere
        )  # fmt: skip
        self._held = (places, sums)  # what C has pointers to
        self._call = native.library().loratools_pass_rows

    def between(self, source: int, start: int, target: int, offset: int) -> None:
        """Set the descriptors to read from and write to, and where the tensor begins in each file."""
        tensor = self._tensor
        tensor.source, tensor.start, tensor.target, tensor.offset = source, start, target, offset

    def rows(self, first: int, count: int, measured: int) -> Passed:
        """Read so many rows from `first` on, change and write them; the first `measured` are compared with W.

        Afterwards `stored` holds them as they were, and `made` as they are. Raises `EOFError` with the byte at which
        the source ended, and `OSError` as reading and writing do.
        """
        tensor, from_first, nbytes = self._tensor, first * self._row, count * self._row
        stored = self._memory.of("stored", nbytes, read=tensor.start + from_first)
        made = self._memory.of("made", nbytes, write=tensor.offset + from_first)
        tensor.stored, tensor.made = stored.address, made.address
        self.stored, self.made = stored.view, made.view
        how = self._call(ctypes.byref(tensor), first, count, measured)
        if how == _ENDED:
            raise EOFError(tensor.ended)
        if how in (_READ_FAILED, _WRITE_FAILED):
            import os

            raise OSError(tensor.error, os.strerror(tensor.error))
        zero_row = (tensor.place, tensor.zero_row) if how == _NO_DIRECTION else None
        retained, total, changed = 0.0, 0.0, 0
        for place in self._places:
            sums = place.products
            retained, total, changed = retained + sums.retained, total + sums.total, changed + int(sums.changed)
        return Passed(tensor.largest, zero_row, retained, total, changed)


def _place(each: Rectangle, columns: int, dtype: int, sums: int) -> _Place:
    (first, last, row_step), (column, _, column_step) = each.rows, each.columns
    products = native.Rows(
        dtype=dtype, result=dtype, stride=columns * row_step, step=column_step, bound=each.bound, sums=sums,
        **each.products.pointers(),
    )  # fmt: skip
    return _Place(first, last, row_step, column, products)
