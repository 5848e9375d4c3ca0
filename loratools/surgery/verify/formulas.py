"""What a tile of two models tells, in float64: squares, differences along probes, single elements beside exact ones.

In NumPy, for every dtype and layout; `linalg/native/proof.c` does the same for what is common, many times sooner. Sums
are in another order there, so that their last bits may differ, and no verdict.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loratools.linalg.native import proof
from loratools.linalg.native.proof import Found, Rule
from loratools.storage.codecs.floats import narrow, widen

Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Found", "Rule", "compare", "measure"]


def measure(
    before: Array, after: Array, dtypes: tuple[str, str], X: Array | None = None, Y: Array | None = None, *,
    across: bool = False, native: bool = True,
) -> tuple[float, int]:  # fmt: skip
    """Add (W' − W)·X to Y, or with `across` (W' − W)ᵀ·X; X and Y are float64, a column for each of 16 probes.

    Args:
        before: The bits of W, unsigned integers, (rows, columns).
        after: Those of W', of the same shape.
        dtypes: The dtypes of both.
        X: (columns, 16), or (rows, 16) with `across`. Default: nothing is added anywhere.
        Y: (rows, 16), or (columns, 16) with `across`.
        across: Whether the probes lie along the columns of the matrix. Default: no.
        native: Whether the C code does it where it can. Default: yes.

    Returns:
        The sum of the squares of W', and how many elements differ, all NaN among them.
    """
    if native and proof.serves(before, after, dtypes):
        return proof.measure(before, after, dtypes, X, Y, across=across)
    W, numbers = (widen(bits, dtype, np.float64) for bits, dtype in zip((before, after), dtypes, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        delta = numbers - W
        if X is not None and Y is not None:
            Y += (delta.T if across else delta) @ X
        return float(np.square(numbers).sum()), int(np.count_nonzero(delta))


def compare(
    before: Array, after: Array, dtypes: tuple[str, str], change: Array, rule: Rule, *, rows: Array | None = None,
    columns: Array | None = None, native: bool = True,
) -> Found:  # fmt: skip
    """Compare some rows and columns of W', default all, with W + ΔW rounded to its dtype, as the rule says.

    `change` is ΔW of these elements, float64; `before`, `after`, `dtypes` and `native` are those of `measure`, `rows`
    and `columns` numbers in uint32. Floats are rounded by way of float32, to nearest even.
    """
    if native and proof.serves(before, after, dtypes):
        return proof.compare(before, after, dtypes, change, rule, rows=rows, columns=columns)
    for places, axis in ((rows, 0), (columns, 1)):
        if places is not None:
            before, after = (bits.take(places, axis) for bits in (before, after))
    W, actual = (widen(bits, dtype, np.float64) for bits, dtype in zip((before, after), dtypes, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        exact = W + change
        wide = exact if dtypes[1] == "F64" else exact.astype(np.float32)
        rounded = widen(narrow(wide, dtypes[1]), dtypes[1], np.float64)
        rounded[np.isnan(exact)] = np.nan
        off = np.abs(rounded - actual)
        if rule.ties:
            allowed = rule.unit * (np.abs(W) + rule.reach)
            right = (off == 0) | (np.abs(exact - (rounded + actual) / 2) <= allowed)
        else:
            largest = np.maximum(np.abs(rounded), np.abs(actual))
            unit = rule.unit * (np.maximum(largest, np.abs(change)) if rule.of_change else largest)
            terms = float(np.fmax.reduce(np.abs(W), None, initial=0.0)) + rule.reach if rule.terms else 0.0
            right = (off <= np.maximum(unit, max(rule.terms * terms, rule.smallest))) & np.isfinite(off)
        return Found(
            int(np.count_nonzero(off)), int(right.size - np.count_nonzero(right)),
            float(((actual - W) * change).sum()), float(((rounded - W) * change).sum()), float(np.square(change).sum()),
        )  # fmt: skip
