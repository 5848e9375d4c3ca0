"""`delta.c`: ΔW = W' − W with both norms in one pass, and products of a large matrix with few columns, float32.

It is compiled when the package is installed, where there is a C compiler. `available` says whether it is there. Of a
difference NumPy gives the same bytes (`plain_difference`); where this does not serve products are torch's, which sums
in another order (`linalg/products.py`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from loratools.linalg.native import loaded

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libdelta.so")
LANES = PARTS = 16  # as in delta.c, all of them
FEW, TILE, ASIDE = 64, 32, 2048 + 16
LINE, KEPT = 16, 1 << 20
"""Numbers of float32 in a line of the cache, and as many as a thread holds at most from one product to the next."""
_CODES = {"BF16": 0, "F16": 1, "F32": 2}
_STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


_OWN = local()


class _Change(ctypes.Structure):
    """The same fields, in the same order, as `Change` in delta.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before", "after", "out", "low")),
        *((name, ctypes.c_size_t) for name in ("before_dtype", "after_dtype", "count")),
        *((name, ctypes.c_double) for name in ("norm2", "before2", "lost2")),
    )


class _Product(ctypes.Structure):
    """The same fields, in the same order, as `Product` in delta.c, where they are explained."""

    _fields_ = (
        ("D", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("stride", "rows", "columns")),
        ("X", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("down", "over", "k")),
        *((name, ctypes.c_void_p) for name in ("out", "panels", "back", "memory")),
    )


@cache
def _library() -> tuple[Any, int]:
    """Return the compiled library and the numbers of its widest vectors; None and 0 where it does not serve."""
    calls = ("difference", "times", "across", "both", "times_bf16", "across_bf16", "gram")
    return loaded.load(LIBRARY, "delta_width", {"change_size": _Change, "product_size": _Product}, calls)


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def widths() -> list[int]:
    """Return the widths of vectors that this processor has, in float32 numbers, the widest first; all give one result.

    Empty where nothing serves.
    """
    return loaded.widths(_library()[1])


def multiplies_bf16() -> bool:
    """Tell whether `times` and `across` take a D of BF16 here: an instruction of some processors."""
    return available() and bool(_library()[0].loratools_multiplies_bf16())


def differs(*dtypes: str) -> bool:
    """Tell whether `difference` takes numbers of these dtypes."""
    return all(dtype in _CODES for dtype in dtypes)


def difference(
    before: memoryview, after: memoryview, dtypes: tuple[str, str], out: Array, low: Array | None = None, *,
    width: int | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Store W' − W in `out`; return ‖W' − W‖², ‖W‖² and what `low` lacks of the first, summed in float64.

    Args:
        before: The bytes of W, of a dtype that `differs` knows.
        after: The bytes of W', likewise.
        dtypes: Those of W and of W'.
        out: Float32, contiguous, of as many numbers as both.
        low: For W' − W rounded to BF16: its bits, uint16, contiguous, of as many numbers. Default: not wanted.
        width: Numbers of a vector, one of `widths()`. Default: as many as the processor has, or NumPy where none serve.

    Returns:
        The sums, the first two NaN or infinite exactly where a number is; the last ‖W' − W − low‖², 0 without `low`.

    Raises:
        ValueError: They are not of one length.
    """
    count = out.size
    sizes = [np.dtype(_STORED[dtype]).itemsize * count for dtype in dtypes]
    arrays = [(out, np.float32), *([] if low is None else [(low, np.uint16)])]
    fits = all(array.size == count and array.dtype == dtype and array.flags.c_contiguous for array, dtype in arrays)
    if [len(before), len(after)] != sizes or not fits:
        raise ValueError(f"{len(before)} and {len(after)} bytes of {dtypes} are not {count} numbers each")
    library, widest = _library()
    if not widest:
        return plain_difference(before, after, dtypes, out, low)
    places = [_at(np.frombuffer(piece, np.uint8)) for piece in (before, after)]
    call = _Change(*places, _at(out), _at(low), *(_CODES[dtype] for dtype in dtypes), count)
    library.loratools_difference(ctypes.byref(call), width or widest)
    return call.norm2, call.before2, call.lost2


def plain_difference(
    before: memoryview, after: memoryview, dtypes: tuple[str, str], out: Array, low: Array | None = None
) -> tuple[float, float, float]:
    """Do what `difference` does, in NumPy: the same bytes and the same sums."""
    W, new = (_widened(piece, dtype) for piece, dtype in zip((before, after), dtypes, strict=True))
    flat, lost2 = out.reshape(-1), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(new, W, out=flat)
        if low is not None:
            bits = flat.view(np.uint32)
            low.reshape(-1)[:] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
            lost2 = _squares(flat - (low.reshape(-1).astype(np.uint32) << 16).view(np.float32))
        return _squares(flat), _squares(W), lost2


def _at(array: Any) -> int | None:
    """Return the address of the first number of an array, None for none."""
    if array is None:
        return None
    flags = array.flags
    if flags.c_contiguous and flags.writeable and array.size:  # in half the time
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    address: int = array.__array_interface__["data"][0]
    return address


def _room(numbers: int) -> tuple[Array, int]:
    """Return memory for so many float32 for one call of this thread, and where in it the first line begins.

    Fresh pages cost more than some products; more of them than `KEPT` are not held.
    """
    held: tuple[Array, int] | None = getattr(_OWN, "room", None)
    if held is None or len(held[0]) < numbers + LINE:
        made = np.empty(numbers + LINE, np.float32)
        held = made, -(-made.__array_interface__["data"][0] // (4 * LINE)) * 4 * LINE
        if numbers <= KEPT:
            _OWN.room = held
    return held


def _widened(piece: memoryview, dtype: str) -> Array:
    numbers = np.frombuffer(piece, _STORED[dtype])
    if dtype == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def _squares(numbers: Array) -> float:
    """Return the sum of squares in the order of delta.c: PARTS sums of every PARTS-th number, then those."""
    padded = np.zeros((-(-len(numbers) // PARTS), PARTS))
    padded.reshape(-1)[: len(numbers)] = numbers
    total = 0.0
    for part in np.add.reduce(padded * padded, axis=0).tolist():
        total += part
    return total


def times(D: Array, X: Array, *, width: int | None = None) -> Array:
    """Return D·X, float32 (rows, k), of D (rows, columns) with contiguous rows and X (columns, k) in float32.

    D is in float32, or holds the bits of BF16 as uint16 in an even number of columns; then X is rounded to BF16 too,
    and sums are in float32.
    """
    return _product("times", D, X, np.empty((len(D), _padded(X.shape[1])), np.float32), D.shape[1], width)


def across(D: Array, X: Array, *, width: int | None = None) -> Array:
    """Return Dᵀ·X, float32 (columns, k), of D (rows, columns) as `times` has it and X (rows, k) in float32."""
    return _product("across", D, X, np.empty((D.shape[1], _padded(X.shape[1])), np.float32), len(D), width)


def both(D: Array, X: Array, *, width: int | None = None) -> tuple[Array, Array]:
    """Return Y = D·X (rows, k) and DᵀY (columns, k), of a D and X in float32 as `times` takes them.

    They are, bit for bit, what `times` and then `across` give, from one pass over D.
    """
    back = np.zeros((D.shape[1], _padded(X.shape[1])), np.float32)
    out = np.empty((len(D), back.shape[1]), np.float32)
    return _product("both", D, X, out, D.shape[1], width, back), back[:, : X.shape[1]]


def gram(D: Array, X: Array, *, width: int | None = None) -> Array:
    """Return Dᵀ·X in float64 (columns, k), of D (rows, columns) and X (rows, k), both float32 with contiguous rows."""
    if X.shape[1] > 1 and X.strides[1] != 4:
        raise ValueError(f"X {X.shape} with steps {X.strides} is not contiguous rows")
    return _product("gram", D, X, np.empty((D.shape[1], _padded(X.shape[1])), np.float64), len(D), width)


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def _product(
    name: str, D: Array, X: Array, out: Array, length: int, width: int | None, back: Array | None = None
) -> Array:
    """Call a product of D with X (length, k); return the first k columns of `out`."""
    size, wide, low = D.itemsize, out.shape[1], D.dtype == np.uint16 and name in ("times", "across")
    known = X.dtype == np.float32 and (low or D.dtype == np.float32)
    together = len(X) == length and (not D.size or D.shape[1] <= 1 or D.strides[1] == size)
    if not known or not together or (low and (D.shape[1] % 2 or not multiplies_bf16())):
        raise ValueError(f"D {D.dtype} {D.shape} with steps {D.strides} and X {X.dtype} {X.shape} do not go together")
    if not out.size or not length:
        return np.zeros((len(out), X.shape[1]), out.dtype)
    panels = 0 if name == "gram" else (length + 1) * wide
    memory = 2 * FEW * (_padded(D.shape[1]) + wide) if name == "gram" else TILE * ASIDE * low * (name == "across")
    held, room = _room(panels + memory)
    call = _Product(
        _at(D), D.strides[0] // size, *D.shape, _at(X), X.strides[0] // 4, X.strides[1] // 4, X.shape[1],
        _at(out), room, _at(back), room + 4 * panels,
    )  # fmt: skip
    library, widest = _library()
    getattr(library, f"loratools_{name}{'_bf16' if low else ''}")(ctypes.byref(call), width or widest)
    del held  # not before the call is over
    return out[:, : X.shape[1]]
