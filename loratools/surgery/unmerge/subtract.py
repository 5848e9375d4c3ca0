"""Take adapters out by subtraction, W̃ = W' − ΔW: what a merge that only added allows without residual and base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratools.adapter.model import AdapterInput
from loratools.engine.plan import MergePlan
from loratools.engine.run import Settings, write_weights
from loratools.errors import IncompatibleAdapter
from loratools.format.record import of_merge
from loratools.parallel import Progress
from loratools.storage import dtypes, files
from loratools.storage.codecs.floats import unsigned, widen
from loratools.storage.companions import companions
from loratools.storage.header import TensorSpec
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.unmerge.merged import MergedModel


def subtract(
    merged: MergedModel, added: Sequence[AdapterInput], options: MergeOptions, threads: int, progress: Progress,
    scratch: Path,
) -> tuple[MergePlan, float]:  # fmt: skip
    """Write W̃ = W' − ΔW + ΔW_added in float32, rounded once, into `scratch`, with everything beside the weights.

    Returns the plan of it, and a bound on |W̃ − W − ΔW_added| for every element. Raises `IncompatibleAdapter` where the
    merge did more than to add.
    """
    inputs = (*(replace(each, weight=-each.weight) for each in merged.inputs), *added)
    plan = plan_merge(merged.model, inputs, options)
    touched = plan.touched().items()
    problems = [f"{name}: was replaced by the adapter's own" for name, change in touched if change.replaced]
    problems += [
        f"{name}: {placement.update.kind} is not a sum"
        for name, change in touched
        for _, placement in change.placements
        if not placement.update.additive
    ]
    if problems:
        raise IncompatibleAdapter(
            "W' − ΔW does not unmerge this model",
            problems[:20],
            hint="Merge with --keep-residual, which restores any base; or use the base model.",
        )
    merged.check_orientation(plan.turned())
    results = write_weights(plan, scratch, Settings(threads, retention="off"), progress)
    written = {name: spec for file in plan.files for name, spec in file.specs(scratch).items()}
    bound = max((_error_bound(plan.changes[r.name].source, written[r.name]) for r in results), default=0.0)
    record = of_merge(merged.model, inputs, plan.turned())
    record |= {"operation": "switch" if added else "unmerge", "approximate": True, "error_bound": bound}
    write_companions(plan, companions(merged.model, [each.path for each in added]), record, scratch)
    return plan, bound


def _error_bound(merged: TensorSpec, written: TensorSpec) -> float:
    """Return (2^-p + 8·2^-q)·(max |W'| + max |W̃|): how far an element of W̃ can be from the base's.

    2^-p is half a unit of the dtype, for each of the two roundings; 2^-q that of the arithmetic, 24 bits (53 for F64),
    whose sums err by a few.
    """
    precision = dtypes.MANTISSA[written.dtype]
    return (2.0**-precision + 8 * 2.0 ** -max(precision, 24)) * (_largest(merged) + _largest(written))


def _largest(spec: TensorSpec) -> float:
    import numpy as np

    pieces = (np.frombuffer(chunk, unsigned(spec.dtype)) for chunk in files.chunks(spec))
    return max((float(np.abs(widen(bits, spec.dtype, np.float64)).max()) for bits in pieces), default=0.0)
