"""`proof.c`: what two models differ by, along probes and in single elements, as `surgery/verify` has it in NumPy.

It is compiled when the package is installed, where there is a C compiler. `available` says whether it is there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libproof.so")
PROBES, BYTES, ROWS = 16, 1 << 17, 8  # as in proof.c and passes.h
DTYPES = {"BF16": 0, "F16": 1, "F32": 2}
_POINTERS, _SIZES = ("before", "after"), ("before_dtype", "after_dtype", "stride", "rows", "columns")


class _Region(ctypes.Structure):
    """The same fields, in the same order, as `Region` in proof.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_size_t) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in ("X", "Y")),
        ("across", ctypes.c_size_t),
        ("squares", ctypes.c_double),
        ("differing", ctypes.c_uint64),
    )


class _Elements(ctypes.Structure):
    """The same fields, in the same order, as `Elements` in proof.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_size_t) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in ("row_at", "column_at", "change")),
        ("pitch", ctypes.c_size_t),
        *((name, ctypes.c_double) for name in ("reach", "unit", "smallest", "terms")),
        *((name, ctypes.c_size_t) for name in ("ties", "of_change")),
        *((name, ctypes.c_uint64) for name in ("wrong", "far")),
        *((name, ctypes.c_double) for name in ("actual", "expected", "total")),
    )


class _Pass(ctypes.Structure):
    """The same fields, in the same order, as `Pass` in passes.h, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_int64 * 2) for name in ("files", "starts")),
        ("memory", ctypes.c_void_p * 2),
        ("region", _Region),
        ("kept", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("stored", ctypes.c_void_p * 2),
        ("which", ctypes.c_size_t),
        ("ended", ctypes.c_int64),
        ("error", ctypes.c_uint32),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not compiled here
        return None, 0
    for name in ("proof_width", "region_size", "elements_size"):
        getattr(library, f"loratools_{name}").restype = ctypes.c_size_t
    sizes = ctypes.sizeof(_Region), ctypes.sizeof(_Elements)
    if (library.loratools_region_size(), library.loratools_elements_size()) != sizes:
        return None, 0  # of another proof.c
    for name in ("measure", "compare"):
        function: Any = getattr(library, f"loratools_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    if hasattr(library, "loratools_pass"):
        library.loratools_pass_size.restype = ctypes.c_size_t
        library.loratools_pass.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 3]
    return library, int(library.loratools_proof_width())


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def widths() -> list[int]:
    """Return the widths of vectors that this processor has, in float64 numbers, the widest first; all give one result.

    Empty where nothing serves.
    """
    return [width for width in (8, 4, 2) if width <= _library()[1] and (width > 2 or _library()[1] == 2)]


def serves(before: Array, after: Array, dtypes: tuple[str, str]) -> bool:
    """Tell whether the C code knows these dtypes, and rows that lie so: each contiguous, in both arrays alike."""
    sizes = before.itemsize, after.itemsize
    rows = all(array.strides[1] == size or array.shape[1] < 2 for array, size in zip((before, after), sizes))  # noqa: B905
    alike = before.strides[0] // sizes[0] == after.strides[0] // sizes[1]
    return available() and set(dtypes) <= DTYPES.keys() and rows and alike and before.strides[0] >= 0


def measure(
    before: Array, after: Array, dtypes: tuple[str, str], X: Array | None = None, Y: Array | None = None, *,
    across: bool = False, width: int | None = None,
) -> tuple[float, int]:  # fmt: skip
    """Add (W' − W)·X to Y, or with `across` (W' − W)ᵀ·X, in float64.

    Args:
        before: The bits of W, unsigned integers, (rows, columns), such that `serves` is true.
        after: Those of W', of the same shape.
        dtypes: The dtypes of both: BF16, F16 or F32.
        X: Probes in float64, (columns, 16), or (rows, 16) with `across`. Default: nothing is added anywhere.
        Y: Float64, (rows, 16), or (columns, 16) with `across`; contiguous, as X.
        across: Whether the products are along the rows' direction. Default: no.
        width: Numbers of a vector, one of `widths()`. Default: as many as the processor has.

    Returns:
        The sum of the squares of W', and how many elements differ, all NaN among them.

    Raises:
        ValueError: Arrays do not go together.
    """
    rows, columns = before.shape
    sides = (rows, columns) if across else (columns, rows)
    probes = [(array.shape, array.dtype.name, array.flags.c_contiguous) for array in (X, Y) if array is not None]
    wanted = [((side, PROBES), "float64", True) for side in sides]
    if after.shape != before.shape or probes not in ([], wanted):
        raise ValueError(f"W {before.shape}, W' {after.shape} and probes {probes} do not go together")
    if not before.size:
        return 0.0, 0
    call = _Region(
        _at(before), _at(after), *_laid_out(before, dtypes), *map(_at, (X, Y)), across,
    )  # fmt: skip
    _call(lambda library: library.loratools_measure, call, width)
    return call.squares, call.differing


@dataclass(frozen=True, slots=True)
class Rule:
    """What a number may be, given the exact one: which dtype it has does not say all.

    With `ties` it is the rounded one, or its neighbour where the exact sum lies as near to the middle of both as `unit`
    of |W| + `reach`. Without, it is off by no more than `unit` of both numbers, and `of_change` of the change, or than
    `smallest`, or `terms` of the largest |W| here + `reach`.
    """

    ties: bool
    reach: float
    unit: float
    of_change: bool = False
    smallest: float = 0.0
    terms: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """Elements that are not the rounded ones, and those too far from them; ⟨W' − W, ΔW⟩, actual and expected, ‖ΔW‖²."""

    wrong: int
    far: int
    actual: float
    expected: float
    total: float


def compare(
    before: Array, after: Array, dtypes: tuple[str, str], change: Array, rule: Rule, *, rows: Array | None = None,
    columns: Array | None = None, width: int | None = None,
) -> Found:  # fmt: skip
    """Compare some rows and columns of W' with W + ΔW, rounded to nearest even by way of float32.

    `before`, `after`, `dtypes` and `width` are those of `measure`. `change` is ΔW of the elements compared, float64.
    `rows` and `columns` say which they are, uint32; default: all. Raises `ValueError` for arrays that do not go
    together.
    """
    picked = [(rows, before.shape[0]), (columns, before.shape[1])]
    shape = tuple(side if places is None else len(places) for places, side in picked)
    outside = any(places is not None and len(places) and places.max() >= side for places, side in picked)
    if after.shape != before.shape or change.shape != shape or change.dtype.name != "float64" or outside:
        raise ValueError(f"W {before.shape}, W' {after.shape} and ΔW {change.shape} of {shape} do not go together")
    if not change.size:
        return Found(0, 0, 0.0, 0.0, 0.0)
    if change.strides[1] != 8 or change.strides[0] < 0:
        change = np.ascontiguousarray(change)
    lists = [None if places is None else np.ascontiguousarray(places, np.uint32) for places, _ in picked]
    _, _, stride, *_ = _laid_out(before, dtypes)
    call = _Elements(
        _at(before), _at(after), *(DTYPES[dtype] for dtype in dtypes), stride, *shape, *map(_at, lists), _at(change),
        change.strides[0] // 8, rule.reach, rule.unit, rule.smallest, rule.terms, rule.ties, rule.of_change,
    )  # fmt: skip
    _call(lambda library: library.loratools_compare, call, width)
    return Found(call.wrong, call.far, call.actual, call.expected, call.total)


def passes() -> bool:
    """Tell whether `Pass` serves: the C code is there, and this system reads files as it does."""
    library, width = _library()
    return width > 0 and hasattr(library, "loratools_pass") and library.loratools_pass_size() == ctypes.sizeof(_Pass)


class Pass:
    """A way through one tensor of two models, which reads it from both files and measures it.

    Args:
        files: The descriptors, before and after.
        starts: The byte at which the tensor begins in each.
        dtypes: BF16, F16 or F32, of each.
        X: Probes in float64, contiguous, (columns, 16).
        Y: Float64, contiguous, (rows of the tensor, 16): products are added to it as `measure` does.
        kept: Numbers of columns, uint32, of which the stored bits are kept.
        memory: For each model an array of `room_for` bytes, which a call overwrites.

    Raises:
        ValueError: Arrays do not go together.
    """

    def __init__(
        self, files: tuple[int, int], starts: tuple[int, int], dtypes: tuple[str, str], X: Array, Y: Array, kept: Array,
        memory: tuple[Array, Array],
    ) -> None:  # fmt: skip
        columns = len(X)
        probes = [(array.shape[1:], array.dtype.name, array.flags.c_contiguous) for array in (X, Y)]
        room = min(array.nbytes for array in memory)
        if probes != [((PROBES,), "float64", True)] * 2 or room < room_for(columns, dtypes):
            raise ValueError(f"probes {probes} and memory of {room} bytes do not go together")
        if kept.dtype != np.uint32 or (len(kept) and kept.max() >= columns):
            raise ValueError(f"the columns to keep are not uint32, or none of {columns}")
        kept = np.ascontiguousarray(kept)
        first, second = (DTYPES[dtype] for dtype in dtypes)
        region = _Region(None, None, first, second, columns, 0, columns, _at(X), _at(Y))
        sides = ctypes.c_int64 * 2
        self._pass = _Pass(
            sides(*files), sides(*starts), (ctypes.c_void_p * 2)(*map(_at, memory)), region, _at(kept), len(kept)
        )
        self._bits = [np.dtype(np.uint32 if dtype == "F32" else np.uint16) for dtype in dtypes]
        self._held = (X, Y, kept, memory)  # what C has pointers to

    def rows(self, first: int, count: int, *, width: int | None = None) -> tuple[float, int, Array, Array]:
        """Measure so many rows from `first` on; return what `measure` does, and the bits that are kept of both.

        These are (count, kept). Raises `OSError` as reading does, and where a file ends too early `EOFError` with 0 or
        1, for the file before or after, and the byte at which it ended; `ValueError` for rows that are not there.
        """
        call, rows = self._pass, len(self._held[1])
        if first < 0 or count < 0 or first + count > rows:
            raise ValueError(f"rows [{first}, {first + count}) are not all among {rows}")
        stored = [np.empty((count, call.count), bits) for bits in self._bits]
        call.stored = (ctypes.c_void_p * 2)(*map(_at, stored))
        library, widest = _library()
        how = library.loratools_pass(ctypes.byref(call), first, count, width or widest)
        if how == 2:
            raise EOFError(call.which, call.ended)
        if how:
            raise OSError(call.error, os.strerror(call.error))
        return call.region.squares, call.region.differing, stored[0], stored[1]


def room_for(columns: int, dtypes: tuple[str, str]) -> int:
    """Return the bytes of memory that `Pass` takes for each model."""
    return max(BYTES, ROWS * columns * (4 if "F32" in dtypes else 2))


def _call(function: Callable[[Any], Any], call: ctypes.Structure, width: int | None) -> None:
    library, widest = _library()
    function(library)(ctypes.byref(call), width or widest)


def _laid_out(before: Array, dtypes: tuple[str, str]) -> tuple[int, ...]:
    return *(DTYPES[dtype] for dtype in dtypes), before.strides[0] // before.itemsize, *before.shape


def _at(array: Array | None) -> int | None:
    """Return the address of an array's first number; `array.ctypes` takes four times as long."""
    return None if array is None else array.__array_interface__["data"][0]
