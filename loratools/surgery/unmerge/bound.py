"""How far a model can be from its base and the adapters that stay in it, after others were taken out by subtraction.

A merge rounds W + ΔW to W', and taking ΔW out again rounds W' − ΔW to W̃. Each rounding errs by half a unit in the last
place of the dtype, by a whole one where it was stochastic; each sum in float32 by (k + 4)·2^-24 of its terms' sizes,
for a product of k columns and rows. Errors of further steps add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from loratools.adapter.placement.resolve import Placement
from loratools.engine.plan import MergePlan
from loratools.format.record import ERROR
from loratools.storage import dtypes, files
from loratools.storage.codecs.floats import unsigned, widen
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor


def error_bound(plan: MergePlan, written: Mapping[str, TensorSpec], record: Mapping[str, Any]) -> float:
    """Return how far any element of `written` can be from the base with the adapters that it holds.

    `plan` made it from a merged model, and `record` is that of the merged model, {} where there is none: then it is
    taken for a merge that rounded once. Every tensor that is changed is read, and all where the merge cast them.
    """
    before = record.get(ERROR)
    stochastic = isinstance(record.get("rounding"), Mapping)
    touched = plan.touched()
    worst = 0.0
    for name, change in plan.changes.items():
        merged = change.source
        first = before is None and (name in touched or record.get("dtype") is not None)
        if merged.dtype not in dtypes.MANTISSA or not (first or name in touched):
            continue
        largest = _largest(merged)
        error = 0.0
        if first:
            units = 2 if stochastic and merged.dtype in ("BF16", "F16") else 1
            error += units * dtypes.half_unit(merged.dtype, largest)
        if name in touched:
            after = _largest(written[name])
            error += dtypes.half_unit(written[name].dtype, after)
            ulp = 2.0 ** -max(dtypes.MANTISSA[merged.dtype], 24)
            sums = [_of_sums(placement, plan.weights[i]) for i, placement in change.placements]
            error += ulp * (8 * (largest + after) + (2 if first else 1) * sum(sums))
        worst = max(worst, error)
    return worst + (float(before) if isinstance(before, int | float) else 0.0)


def _of_sums(placement: Placement, weight: float) -> float:
    """Return a bound, in units of the arithmetic, on the error with which one element of an update's ΔW is made."""
    update = placement.update
    factors = update.factored()
    if factors is None:
        # Every other kind makes an element of one number from each row of its parts, at most.
        norms = [float(np.linalg.norm(_numbers(part))) for part in update.parts.values()]
        return abs(weight * update.scaling) * (2 * update.rank + 4) * prod(norms)
    left, right = _numbers(factors.left), _numbers(factors.right)
    size = np.linalg.norm(left, axis=1).max(initial=0.0) * np.linalg.norm(right, axis=0).max(initial=0.0)
    return float(abs(weight * factors.scale) * (len(right) + 4) * size)


def _numbers(lazy: LazyTensor) -> np.ndarray[Any, np.dtype[Any]]:
    numbers: np.ndarray[Any, np.dtype[Any]] = lazy.load().double().numpy()
    return numbers


def _largest(spec: TensorSpec) -> float:
    """Return max |W|; 0 for a tensor without elements."""
    pieces = (np.frombuffer(chunk, unsigned(spec.dtype)) for chunk in files.chunks(spec))
    return max((float(np.abs(widen(bits, spec.dtype, np.float64)).max()) for bits in pieces), default=0.0)


def where_cast(record: Mapping[str, Any]) -> Sequence[str]:
    """Return a sentence on the dtype that the merge gave to all tensors, if it did."""
    dtype = record.get("dtype")
    return (f"tensors stay in {dtype}, in which the merge stored them; the base may have others",) if dtype else ()
