"""`rows.c`, the C of a merge: W + left·right on rows of BF16, F16 or F32, rescaled and rounded, in one pass.

What codes stand for is F32, and is rounded to BF16 or F16 in the same pass.

It is compiled when the package is installed, where there is a C compiler (`build.py`). Without it torch does the same,
several times slower: only the last float32 bit of a sum may differ then.

    rows.c     who calls and what for, and which processor is served
    kernel.h   the arithmetic, compiled once for each width of vectors
    factors    `factors.h`: what is multiplied, arranged for it
    tiles      `tiles.h`: a tensor passed through it from file to file
    floats.h   BF16, F16 and F32 as float32 and back, for rows.c, residual.c and delta.c
    codes      `codes.c` and `codes.h`: what the codes of quantized weights stand for
    proof      `proof.c` and `proof.h`: what two models differ by; `surgery/verify` shares nothing with a merge
    residual   `residual.c`, `residual.h`, `ranks.h` and `fixed.h`: what tells the base from a merged model and adapters
    steps      what of a merged model it takes back: products on rectangles
    delta      `delta.c` and `delta.h`: ΔW with its norms, and products of a large matrix with few columns
    blocks     `blocks.h`: a step of a block Krylov iteration, made of these products in delta.c
    loaded     loads libraries whose functions take a structure and a width of vectors: delta and residual
    thin       `thin.c` and `thin.h`: factors beside a linear layer of a running model, and their gradients
    build      compiles them when the package is installed
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("librows.so")
LANES = 32  # as in rows.c, both
MOST_ROWS = 8
DTYPES = {"uint16": 0, "float16": 1, "float32": 2}
"""The numbers of BF16 (as its bits), F16 and F32 in C, by the names that NumPy gives them."""


class Rows(ctypes.Structure):
    """The same fields, in the same order, as `Rows` in rows.c, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "out")),
        *((name, ctypes.c_size_t) for name in ("dtype", "result", "stride", "step", "rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "factor", "scale", "magnitude", "gains")),
        ("bound", ctypes.c_double),
        ("sums", ctypes.c_void_p),
        ("measured", ctypes.c_size_t),
        *((name, ctypes.c_double) for name in ("retained", "total", "changed")),
        *((name, ctypes.c_uint64) for name in ("overflowed", "flushed")),
        ("zero_row", ctypes.c_int64),
        ("largest", ctypes.c_uint32),
    )


@cache
def _library() -> tuple[Any, str]:
    """Return the compiled library, or None and why it does not serve."""
    if not LIBRARY.exists():
        return None, "the C code is not compiled here"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the compiled C code does not load: {error}"
    loaded.loratools_rows_size.restype = ctypes.c_size_t
    size = loaded.loratools_rows_size()
    if size != ctypes.sizeof(Rows):
        return None, "the C code was compiled from another rows.c" if size else "torch is faster on this processor"
    for function in (loaded.loratools_add_products, loaded.loratools_round_rows):
        function.argtypes = [ctypes.POINTER(Rows)]
        function.restype = None
    loaded.loratools_bound.restype = ctypes.c_double
    loaded.loratools_sum_size.restype = ctypes.c_size_t
    if hasattr(loaded, "loratools_pass_rows"):  # where files are read and written as POSIX has it
        loaded.loratools_pass_rows.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 3]
        loaded.loratools_tensor_size.restype = ctypes.c_size_t
    return loaded, ""


def library() -> Any:
    """Return the compiled library, for the modules of this folder; None where there is none."""
    return _library()[0]


def available() -> bool:
    """Tell whether the C code was compiled at installation, and is fast on this processor."""
    return not why_not()


def why_not() -> str:
    """Say why the C code does not serve here; nothing where it does."""
    return _library()[1]


@dataclass(slots=True, eq=False)
class Products:
    """left·right as the C code takes it: rows one after another, the columns of right in panels. See `products`."""

    left: Array
    panels: Array
    factor: Array
    scale: Array
    magnitude: Array | None
    columns: int

    @property
    def memory(self) -> int:
        """Number of float32 sums that a call needs memory for."""
        return (MOST_ROWS + 2) * LANES * len(self.panels)


def products(left: Array, right: Array, factor: Array, scale: Array, magnitude: Array | None = None) -> Products:
    """Arrange left (rows, r) and right (r, columns) in float32, left being `factor`·diag(`scale`) rounded.

    `factor` is in float32, `scale` and the `magnitude` of each row, if any, in float64. Raises `ValueError` for arrays
    that do not go together.
    """
    import numpy as np

    rank, columns = right.shape
    shapes = [left.shape, factor.shape, scale.shape, *([] if magnitude is None else [magnitude.shape])]
    wanted = [(len(left), rank), (len(left), rank), (rank,), (len(left),)]
    if shapes != wanted[: len(shapes)]:
        raise ValueError(f"left, factor, scale and magnitude have the shapes {shapes}, expected {wanted}")
    count = -(-columns // LANES)
    padded = np.zeros((rank, count * LANES), np.float32)
    padded[:, :columns] = right
    panels = np.ascontiguousarray(padded.reshape(rank, count, LANES).transpose(1, 0, 2))
    left, factor = (np.ascontiguousarray(matrix, np.float32) for matrix in (left, factor))
    if magnitude is not None:
        magnitude = np.ascontiguousarray(magnitude, np.float64)
    return Products(left, panels, factor, np.ascontiguousarray(scale, np.float64), magnitude, columns)


@dataclass(slots=True, eq=False)
class Outcome:
    """What a call met: the bits of the largest magnitude, a row without direction, the sums behind the retention.

    Where F32 became 16 bit: how many finite numbers `overflowed` to infinity, and others were `flushed` to zero.
    """

    largest: int
    zero_row: int | None
    retained: float
    total: float
    changed: int
    overflowed: int
    flushed: int


def add_products(
    W: Array, out: Array, terms: Products, rows: slice, sums: Array, *, gains: Array | None = None,
    bound: float = 0.0, measured: int = 0,
) -> Outcome:  # fmt: skip
    """Store g∘(W + left·right) for `rows` of the products in `out`; W and out are (rows, columns).

    They are BF16 as uint16, float16 or float32, with any steps from row to row and column to column; both of one dtype,
    or W in float32. g is 1, or magnitude / ‖W + left·right‖ for each row, which is left in `gains`. Sums are in
    float32, rounded once; 16-bit results of a magnitude below |g|·`bound` are computed in float64. The first `measured`
    rows are compared with W. `sums` is memory for so many float32 numbers as the products say, `gains` is in float64.
    NaN and infinities are results like others. Raises `ValueError` for arrays of other shapes.
    """
    count = rows.stop - rows.start
    stride, step = _laid_out(W, out)
    if W.shape != (count, terms.columns):
        raise ValueError(f"W {W.shape} is not ({count}, {terms.columns})")
    if (gains is None) != (terms.magnitude is None) or sums.size < terms.memory:
        raise ValueError(f"gains go with a magnitude; sums take {terms.memory} numbers, not {sums.size}")
    if any(rows.stop > len(array) for array in (terms.left, gains) if array is not None):
        raise ValueError(f"{rows} are not rows of left, {terms.left.shape}, or have no gains")

    call = Rows(
        pointer(W), pointer(out), DTYPES[W.dtype.name], DTYPES[out.dtype.name], stride, step, *W.shape,
        terms.left.shape[1],
        pointer(terms.left, rows), pointer(terms.panels), pointer(terms.factor, rows), pointer(terms.scale),
        pointer(terms.magnitude, rows), pointer(gains, rows), bound, pointer(sums), measured,
    )  # fmt: skip
    library().loratools_add_products(ctypes.byref(call))
    return _outcome(call, rows.start)


def round_rows(W: Array, out: Array) -> Outcome:
    """Store W (rows, columns), float32, in `out`, BF16 as uint16 or float16, rounded to nearest even.

    Raises `ValueError` for arrays of different shapes, or laid out in different ways.
    """
    stride, step = _laid_out(W, out)
    if W.dtype.name != "float32" or out.dtype.name == "float32":
        raise ValueError(f"{W.dtype} is rounded to {out.dtype}, and float32 to 16 bit is what is known")
    call = Rows(W.ctypes.data, out.ctypes.data, 2, DTYPES[out.dtype.name], stride, step, *W.shape, zero_row=-1)
    library().loratools_round_rows(ctypes.byref(call))
    return _outcome(call, 0)


def pointer(array: Array | None, part: slice = slice(None)) -> int | None:
    """Return the address of an array's rows; None, which is NULL, for none."""
    return None if array is None else array[part].ctypes.data


def _laid_out(W: Array, out: Array) -> tuple[int, int]:
    """Return the elements from row to row and from column to column, which W and out have alike."""
    size, (down, across) = W.itemsize, W.strides
    stride, step = down // size, across // size
    alike = W.shape == out.shape and out.strides == (stride * out.itemsize, step * out.itemsize)
    if not alike or not (W.dtype == out.dtype or W.dtype.name == "float32"):
        raise ValueError(f"W {W.dtype} {W.shape} and out {out.dtype} {out.shape} are not rows laid out alike")
    return stride, step


def _outcome(call: Rows, first: int) -> Outcome:
    zero_row = None if call.zero_row < 0 else first + call.zero_row
    return Outcome(call.largest, zero_row, call.retained, call.total, int(call.changed), call.overflowed, call.flushed)
