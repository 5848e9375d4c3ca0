"""Take adapters out by subtraction, W̃ = W' − ΔW: what a merge that only added allows without residual and base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratools.adapter.input import AdapterInput
from loratools.adapter.placement.codes import stored_as_codes
from loratools.errors import IncompatibleAdapter, counted
from loratools.format.record import BROUGHT, ERROR, REPLACED, TOOL, WORDS
from loratools.parallel import Progress
from loratools.storage import atomic, digest, dtypes
from loratools.storage.lazy import LazyTensor
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.measured import Measured
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.prepare import Merge, decide
from loratools.surgery.merge.run import write_tensors
from loratools.surgery.unmerge.bound import error_bound, where_cast
from loratools.surgery.unmerge.merged import MergedModel


@dataclass(frozen=True, slots=True, eq=False)
class Subtraction:
    """What `subtract` did; `bound` limits |W̃ − W − ΔW_added| of every element."""

    prepared: Merge
    measured: Measured
    bound: float
    notes: tuple[str, ...]


def subtract(
    merged: MergedModel, added: Sequence[AdapterInput], options: MergeOptions, output: Path, progress: Progress,
    scratch: Path,
) -> Subtraction:  # fmt: skip
    """Write W̃ = W' − ΔW + ΔW_added in float32, rounded once, into `scratch`, with everything beside the weights.

    The record that comes with it lists the adapters which the result holds, so that they can be taken out in turn; its
    bound covers all steps since the merge. Raises `IncompatibleAdapter` where the merge did more than to add.
    """
    _check_sums(merged, added)
    _refuse_codes(merged)
    of_base = merged.below.tensors
    elsewhere = {
        name: partial(_is_recorded, recorded, merged.model.specs[name].dtype)
        for name, recorded in of_base.items()
        if name in merged.model.specs
    }
    prepared = decide(
        merged.model, added, output, options, taken=merged.inputs, below=merged.below, elsewhere=elsewhere
    )
    plan = prepared.plan
    _check_sums(merged, plan.inputs[: len(added)])  # copies of the base that turned out to be others
    merged.check_orientation(plan.turned()[len(added) :])
    atomic.check_space(output, sum(file.size for file in plan.files))
    notes = (*plan.notes, *where_cast(merged.record), *_unknown(merged))
    brought = merged.tell_brought(prepared.beside)
    measured = write_tensors(prepared, scratch, progress)
    measured.tell(options, scratch)
    written = {name: spec for file in plan.files for name, spec in file.specs(scratch).items()}
    bound = error_bound(plan, written, merged.record)
    write_companions(plan, prepared.beside, _record(merged, prepared, measured, bound, brought), scratch)
    return Subtraction(prepared, measured, bound, notes)


def _refuse_codes(merged: MergedModel) -> None:
    """Raise `IncompatibleAdapter` where what the merge changed is codes: rounding on a grid is not undone by a sum."""
    changed: dict[str, str] = {}
    for each in merged.inputs:
        changed |= stored_as_codes(each.adapter, merged.model)
    if changed:
        raise IncompatibleAdapter(
            f"{merged.model.path}: {counted(len(changed), 'module')} that the merge changed are codes again "
            f"({next(iter(changed.values()))}), from which nothing can be subtracted",
            sorted(changed)[:20],
            hint="Give the base model (--base); a merge with --keep-residual can be undone without it.",
        )


def _record(
    merged: MergedModel, prepared: Merge, measured: Measured, bound: float, brought: Sequence[str]
) -> dict[str, Any]:
    """Return the record of the result: the adapters that it holds, and how far it is from the base with them."""
    old, new = merged.record, prepared.record
    digests = {**measured.digests, **merged.below.tensors} if old else {}
    added = new["adapters"]
    names = [*brought, *new.get(BROUGHT, ())]
    return {
        **new, **{name: old[name] for name in ("dtype", "rounding", "model_type") if name in old},
        "operation": "switch" if added else "unmerge",
        "base": {**(old.get("base") or new["base"]), "tensors": digests},
        "adapters": [*merged.entries_left(), *added],
        "removed": [
            {"digest": each.digest, "weight": each.weight} | ({WORDS: each.words} if each.words else {})
            for each in merged.inputs
        ],
        "tool": TOOL, "tied": old.get("tied") or (new["tied"] if added else None), "retention": measured.retention,
        "approximate": True, ERROR: bound, **({BROUGHT: names} if names else {}),
    }  # fmt: skip


def _is_recorded(recorded: str, dtype: str, copy: LazyTensor) -> bool:
    """Tell by its digest whether an adapter's copy is a tensor of the base: as it is stored, or cast to a `dtype`."""
    forms = [copy]
    if copy.dtype != dtype and {copy.dtype, dtype} <= set(dtypes.FLOATS):
        forms.append(LazyTensor.of(copy.load().to(dtypes.to_torch(dtype))))
    for form in forms:
        hasher = digest.start_tensor(form.dtype, form.shape, algorithm := digest.algorithm_of(recorded))
        for chunk in form.chunks("copy"):
            hasher.update(chunk)
        if digest.finish(hasher, algorithm) == recorded:
            return True
    return False


def _check_sums(merged: MergedModel, added: Sequence[AdapterInput]) -> None:
    """Raise `IncompatibleAdapter` unless all that was merged, and all that is added, is a sum."""
    replaced = {str(name) for entry in merged.entries for name in entry.get(REPLACED) or ()}
    replaced |= {path for each in merged.inputs for path in each.adapter.replacements} if not replaced else set()
    problems = [f"{name}: was replaced by the adapter's own at the merge" for name in sorted(replaced)]
    problems += _no_sums(merged.inputs)
    if problems:
        raise IncompatibleAdapter(
            "W' − ΔW does not unmerge this model",
            problems[:20],
            hint="Merge with --keep-residual, which restores any base; or use the base model.",
        )
    problems = [f"{path}: is replaced by the adapter's own" for each in added for path in each.adapter.replacements]
    if problems := [*problems, *_no_sums(added)]:
        raise IncompatibleAdapter(
            "an adapter that is put in does not only add to W' − ΔW, and rescales or takes tensors as they are",
            problems[:20],
            hint="Only the base model, or a residual of the merge, is what it belongs on: unmerge first, then merge.",
        )


def _no_sums(inputs: Sequence[AdapterInput]) -> list[str]:
    return [
        f"{module}: {update.kind} is not a sum"
        for each in inputs
        for module, update in each.adapter.updates.items()
        if not update.additive
    ]


def _unknown(merged: MergedModel) -> list[str]:
    """Return what no record says of a model, a sentence each."""
    if merged.record:
        return []
    notes = [
        f"{merged.model.path}: no record of its merge, so the bound takes it that the tensors were rounded once, and "
        "that these adapters are in it with these weights"
    ]
    if copies := sorted({path for each in merged.inputs for path in each.adapter.copies}):
        notes.append(f"the adapter has tensors of its own, which stay if the merge took them: {', '.join(copies[:12])}")
    return notes
