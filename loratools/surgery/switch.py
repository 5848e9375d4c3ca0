"""Take adapters out of a merged model and put others in, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratools.adapter.model import AdapterInput
from loratools.engine.residual import Lost, Residual
from loratools.engine.residual.restore import Restorer, file_plan
from loratools.engine.run import Settings, write_weights
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.format.record import of_merge
from loratools.options import CheckBase
from loratools.parallel import Progress, cores, no_progress
from loratools.storage import atomic, digest, files
from loratools.storage.atomic import refuse_inputs
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import companions
from loratools.storage.header import TensorSpec
from loratools.storage.layout import Slot
from loratools.surgery.inputs import AdapterSource, ModelSource, open_adapters, places, under_names_of
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions, Tied
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.unmerge.merged import MergedModel
from loratools.surgery.unmerge.subtract import subtract


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """What became of a model. `exact` says that the result is what merging the new adapters into the base would give.

    Else `error_bound` limits how far any element is from that.
    """

    output: str
    exact: bool
    changed: int
    tensors: int
    error_bound: float
    retention: float | None
    notes: tuple[str, ...] = ()


def switch(
    model: ModelSource,
    out: AdapterSource | Sequence[AdapterSource],
    into: AdapterSource | Sequence[AdapterSource],
    output: str | Path,
    *,
    weights: float | Sequence[float] | None = None,
    check_base: CheckBase = "strict",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> SwitchReport:
    """Write a merged model with the adapters `out` replaced by the adapters `into`.

    With the residual of the merge each tensor is restored, compared with its recorded digest, and merged anew: the
    result is that of a merge into the base. Without it, W'' = W' − ΔW_out + ΔW_in in float32, rounded once, is within
    2^-p·(|W'| + |W''|) of W + ΔW_in, p the bits of the dtype's mantissa, and the report calls it approximate.

    Args:
        model: The merged model: a path, an `hf://` reference, or an open `Checkpoint`.
        out: The adapters to take out, one or several; with a residual every adapter of the merge.
        into: The adapters to put in, one or several.
        output: The folder to write; it must not exist, unless `force`.
        weights: A number for each adapter of `into`; one number for one adapter. Default: 1 for each.
        check_base: What happens where the base is not the one that a new adapter was sealed with: `"strict"` raises,
            `"warn"` reports, `"off"` compares nothing. Without a residual there is no base to compare. Default:
            `"strict"`.
        threads: Threads to work with; no byte depends on it. Default: one per core.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes written since the last call, from any thread. Default: nobody is told.

    Returns:
        Whether the result is exact, and else how far it can be from that.

    Raises:
        InvalidOption, BadFile, UnsupportedAdapter, WrongBase, OutputRefused, NoSpace: As `merge` and `unmerge` do.
        IncompatibleAdapter: Also where the merge changed more than numbers (a new head, a larger vocabulary), which
            takes `unmerge` and `merge` one after the other.

    Example:
        >>> switch("merged", out="adapter", into="other", output="switched").exact
        True
    """
    options = MergeOptions(check_base=check_base, threads=threads, force=force)
    output = Path(output)
    atomic.check_output(output, force=force)
    merged = MergedModel.open(model, out, None)
    merged.check_layers()
    inputs = under_names_of(merged.model, open_adapters(into, merged.model, weights))
    refuse_inputs(output, [merged.model.path, *places(merged.inputs), *places(inputs)])
    residual = merged.residual()
    write = _subtract if residual is None else partial(_restore_and_merge, residual)
    with atomic.new_folder(output, force=force) as scratch:
        return write(merged, inputs, options, progress or no_progress, output, scratch)


def _restore_and_merge(
    residual: Residual,
    merged: MergedModel,
    inputs: Sequence[AdapterInput],
    options: MergeOptions,
    progress: Progress,
    output: Path,
    scratch: Path,
) -> SwitchReport:
    merged.check_complete()
    lost = merged.lost(residual)
    base, slots = _base_in(scratch, merged.model, residual, lost)
    plan = plan_merge(base, inputs, options)
    recorded: Mapping[str, str] = merged.record["base"]["tensors"]
    before = {
        name: partial(_restore, tensor, residual, slots[name], recorded.get(name)) for name, tensor in lost.items()
    }
    settings = Settings(options.threads or cores(), before=before)
    results = write_weights(plan, scratch, settings, progress)
    total = sum(result.total for result in results)
    retention = sum(result.retained for result in results) / total if total else None
    record: dict[str, Any] = of_merge(base, inputs)
    digests = {result.name: result.digests[digest.DEFAULT] for result in results if result.digests}
    of_base = {**merged.record["base"], "tensors": digests}
    record |= {"base": of_base, "tied": None, "dtype": None, "retention": retention}
    write_companions(plan, companions(merged.model, [each.path for each in inputs]), record, scratch)
    changed = len(plan.touched().keys() | lost.keys())
    return SwitchReport(str(output), True, changed, len(plan.changes), 0.0, retention, plan.notes)


def _base_in(
    scratch: Path, model: Checkpoint, residual: Residual, lost: Mapping[str, Lost]
) -> tuple[Checkpoint, dict[str, Slot]]:
    """Return the base as if it were opened, with lost tensors where they will be restored, and their slots."""
    plans = {file.name: file_plan(model, file) for file in residual.layout}
    shards = {str(shard.path.relative_to(model.root)): shard for shard in model.shards}
    laid_out = {name: [(slot.name, slot.dtype, slot.offset) for slot in plan.slots] for name, plan in plans.items()}
    same = laid_out == {
        name: [(tensor, spec.dtype, spec.start) for tensor, spec in shard.tensors.items()]
        for name, shard in shards.items()
    }
    if not same or residual.config or any(tensor.mode == "stored" for tensor in lost.values()):
        raise IncompatibleAdapter(
            f"{model.path}: the merge changed its layout or config.json besides its numbers, so one pass does not do",
            hint="Run `loratools unmerge`, then `loratools merge`.",
        )
    slots = {slot.name: slot for plan in plans.values() for slot in plan.slots}
    files_of = {slot.name: scratch / name for name, plan in plans.items() for slot in plan.slots}
    specs = {
        name: TensorSpec(spec.dtype, spec.shape, files_of[name], spec.start, spec.stop) if name in lost else spec
        for name, spec in model.specs.items()
    }
    shards_of_base = tuple(
        replace(shard, tensors={name: specs[name] for name in shard.tensors}) for shard in model.shards
    )
    return replace(model, shards=shards_of_base, specs=specs), slots


def _restore(lost: Lost, residual: Residual, slot: Slot, recorded: str | None, target: int) -> None:
    """Write a tensor of the base to its slot; raise `WrongBase` unless it has its recorded digest."""
    offset, hasher = slot.offset, digest.start_tensor(lost.dtype, lost.shape)
    for piece in Restorer(lost, residual).pieces():
        hasher.update(piece)
        files.write_from(target, memoryview(piece), offset)
        offset += len(piece)
    restored = digest.finish(hasher)
    if recorded is not None and restored != recorded:
        raise WrongBase(
            f"{residual.path}: tensor {lost.name} was not restored: digest {restored}, recorded {recorded}",
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )


def _subtract(
    merged: MergedModel,
    inputs: Sequence[AdapterInput],
    options: MergeOptions,
    progress: Progress,
    output: Path,
    scratch: Path,
) -> SwitchReport:
    tied: Tied = merged.record.get("tied") or "error"
    options = replace(options, tied=tied, check_base="off")
    made = subtract(merged, inputs, "switch", options, options.threads or cores(), progress, scratch)
    notes = (
        "approximate: W' − ΔW_out + ΔW_in, for no residual of the merge was kept",
        "no base hash of the new adapters was checked",
    )
    changed, tensors = len(made.plan.touched()), len(made.plan.changes)
    return SwitchReport(str(output), False, changed, tensors, made.error_bound, None, notes)
