"""A tile of a tensor to which products are added, step by step in NumPy: for every dtype, and every rectangle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.engine.arithmetic.sums import SumOfProducts
from loratools.engine.tensor import TensorResult
from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes
from loratools.storage.codecs import floats

if TYPE_CHECKING:
    import numpy as np

    from loratools.engine.products import ProductTask

    Array = np.ndarray[Any, np.dtype[Any]]


class Stepwise:
    """Widen, add, rescale, round, check, compute again what is near zero, measure: each in one pass of NumPy."""

    def __init__(self, task: ProductTask, buffers: floats.Buffers, result: TensorResult) -> None:
        self._task, self._buffers, self._result = task, buffers, result
        self._bounds = [term.bound() for term in task.terms]

    def change(self, stored: Array, start: int, measured: int) -> Array:
        """Return the tile whose first row is `start` changed, and add what is measured in its first rows to the result.

        Raises `IncompatibleAdapter` when a value is not finite.
        """
        import numpy as np

        dtype, buffers, stop = self._task.source.dtype, self._buffers, start + len(stored)
        with np.errstate(over="ignore", invalid="ignore"):
            W = floats.widened(stored, dtype, buffers)
            for term in self._task.terms:
                if met := term.site.overlap(start, stop):
                    change = buffers.of(floats.SCRATCH, (met[1].stop - met[1].start) * term.right.shape[1], np.float32)
                    change = change.reshape(-1, term.right.shape[1])
                    part = W[met[0], slice(*term.site.columns)]
                    term.add_to(part, met[1], change)
                    term.finish(part, met[1], buffers)
            out = floats.rounded(W, dtype, buffers)
            magnitude = floats.magnitudes(W if dtype == "F32" else out, buffers)
            check_finite(self._task, int(magnitude.max()))
            for term, bound in zip(self._task.terms, self._bounds, strict=True):
                if dtype != "F32" and (met := term.site.overlap(start, stop)):
                    inside, limits = (met[0], slice(*term.site.columns)), _limits(bound * term.gains(met[1]), dtype)
                    small = buffers.of("small", magnitude[inside].size, np.bool_).reshape(magnitude[inside].shape)
                    np.less(magnitude[inside], limits, out=small)
                    _refine(term, small, met[1].start, stored[inside], out[inside], dtype)
            if measured:
                _measure(self._result, stored[:measured], W[:measured], out[:measured], dtype)
        return out


def check_finite(task: ProductTask, largest: int) -> None:
    """Raise `IncompatibleAdapter` for values whose largest magnitude, as the integer of its bits, is not finite.

    Infinity and NaN have the largest bits of all. A NaN cannot have rounded to another number: what adding makes of a
    stored one, or of infinities, has zeros where BF16 ends.
    """
    if largest >= floats.INFINITY[task.source.dtype]:
        raise IncompatibleAdapter(
            f"{task.name}: the merged values are not finite in {task.source.dtype}",
            hint="Either the base has infinities or NaN there, or the weights overflow this dtype.",
        )


def near_zero(dtype: str) -> float:
    """Return the share of the largest term of a sum below which float32's error may show in BF16 or F16.

    The error of a float32 sum is about 2^-24 of its largest term; it exceeds a unit in the last place of a p-bit result
    only below 2^(p-24) of that. A factor of four is for the length of the sum.
    """
    return 2.0 ** (dtypes.MANTISSA[dtype] - 22)


def _limits(bounds: Array, dtype: str) -> Array:
    """Return the magnitudes, as integers of their bits, below which results are computed again: their terms' bounds."""
    import numpy as np

    with np.errstate(over="ignore"):  # infinity stands for every magnitude
        thresholds = (bounds * near_zero(dtype)).astype(np.float32)
        halves = thresholds.view(np.uint32) >> 16 if dtype == "BF16" else thresholds.astype(np.float16).view(np.uint16)
    found: Array = halves.astype(np.uint16) + np.uint16(1)
    return found


def _refine(term: SumOfProducts, small: Array, first: int, stored: Array, out: Array, dtype: str) -> None:
    """Compute the few results near zero again, in float64, and round them once."""
    import numpy as np

    some = np.flatnonzero(small.any(axis=1))  # nonzero costs far more than any, and few rows have one
    if not len(some):
        return
    rows, columns = np.divmod(np.flatnonzero(small[some]), small.shape[1])
    rows = some[rows]
    W = floats.exactly(stored[rows, columns], dtype).astype(np.float64)
    exact = term.exact(W, rows + first, columns).astype(np.float32)
    out[rows, columns] = floats.rounded(exact, dtype, floats.Buffers())


def _measure(result: TensorResult, stored: Array, W: Array, out: Array, dtype: str) -> None:
    import numpy as np

    base, rounded = (floats.exactly(values, dtype).astype(np.float64).ravel() for values in (stored, out))
    delta, kept = W.astype(np.float64).ravel() - base, rounded - base
    result.retained += float(kept @ delta)
    result.total += float(delta @ delta)
    result.changed += float(np.count_nonzero(kept))
