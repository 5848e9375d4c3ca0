"""Take adapters out of a merged model and put others in, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loratools.adapter.model import AdapterInput
from loratools.engine.plan import MergePlan
from loratools.engine.residual import Lost, Residual
from loratools.engine.residual.restore import file_plan, lost_bytes, write_pieces
from loratools.engine.run import Settings, write_weights
from loratools.engine.task import retention
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.format.record import of_merge
from loratools.options import CheckBase
from loratools.parallel import Progress, cores, no_progress
from loratools.storage import atomic, digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import companions
from loratools.storage.header import TensorSpec
from loratools.storage.sources import Location
from loratools.surgery.inputs import AdapterSource, ModelSource, open_adapters, places, under_names_of
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions
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
    output: Location,
    *,
    weights: float | Sequence[float] | None = None,
    check_base: CheckBase = "strict",
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
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
        durable: Whether the output is on the disk itself before it has its name, so that a power cut leaves it whole or
            absent; it takes as long as the disk needs to write it. Default: no, the system writes it when it likes.
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
    atomic.sweep(output)
    options = MergeOptions(check_base=check_base, threads=threads, force=force, durable=durable)
    output, threads, progress = Path(output), threads or cores(), progress or no_progress
    atomic.check_output(output, force=force)
    merged = MergedModel.open(model, out, None)
    merged.check_layers()
    inputs = under_names_of(merged.model, open_adapters(into, merged.model, weights))
    atomic.refuse_inputs(output, [merged.model.path, *places(merged.inputs), *places(inputs)])
    residual = merged.residual()
    with atomic.new_folder(output, force=force, durable=durable) as scratch:
        if residual is not None:
            plan, changed, survived = _restore_and_merge(merged, residual, inputs, options, threads, progress, scratch)
            return SwitchReport(str(output), True, changed, len(plan.changes), 0.0, survived, plan.notes)
        options = replace(options, tied=merged.record.get("tied") or "error", check_base="off")
        plan, bound = subtract(merged, inputs, options, threads, progress, scratch)
        notes = (
            "approximate: W' − ΔW_out + ΔW_in, for no residual of the merge was kept",
            "no base hash of the new adapters was checked",
        )
        return SwitchReport(str(output), False, len(plan.touched()), len(plan.changes), bound, None, notes)


def _restore_and_merge(
    merged: MergedModel, residual: Residual, inputs: Sequence[AdapterInput], options: MergeOptions, threads: int,
    progress: Progress, scratch: Path,
) -> tuple[MergePlan, int, float | None]:  # fmt: skip
    """Merge anew, each lost tensor restored first; return the plan, how many tensors changed, and the retention."""
    merged.check_complete()
    lost = merged.lost(residual)
    base = _base_in(scratch, merged.model, residual, lost)
    plan = plan_merge(base, inputs, options)
    recorded: Mapping[str, str] = merged.record["base"]["tensors"]
    before = {
        name: partial(_restore, tensor, residual, base.specs[name], recorded.get(name)) for name, tensor in lost.items()
    }
    results = write_weights(plan, scratch, Settings(threads, before=before), progress)
    record = of_merge(base, inputs, plan.turned())
    digests = {result.name: result.digests[digest.DEFAULT] for result in results if result.digests}
    of_base = {**merged.record["base"], "tensors": digests}
    record |= {"base": of_base, "tied": None, "dtype": None, "retention": retention(results)}
    write_companions(plan, companions(merged.model, [each.path for each in inputs]), record, scratch)
    return plan, len(plan.touched().keys() | lost.keys()), retention(results)


def _base_in(scratch: Path, model: Checkpoint, residual: Residual, lost: Mapping[str, Lost]) -> Checkpoint:
    """Return the base as if it were opened, with lost tensors where they will be restored."""
    restored = {Path(file.name): file_plan(model, file).specs(scratch) for file in residual.layout}
    merged = {shard.path.relative_to(model.root): shard.tensors for shard in model.shards}

    def offsets(files: Mapping[Path, Mapping[str, TensorSpec]]) -> dict[Path, list[tuple[str, str, int]]]:
        return {
            path: [(name, spec.dtype, spec.start) for name, spec in tensors.items()] for path, tensors in files.items()
        }

    stored = any(tensor.mode == "stored" for tensor in lost.values())
    if offsets(restored) != offsets(merged) or residual.config or stored:
        raise IncompatibleAdapter(
            f"{model.path}: the merge changed its layout or config.json besides its numbers, so one pass does not do",
            hint="Run `loratools unmerge`, then `loratools merge`.",
        )
    moved = {name: spec for tensors in restored.values() for name, spec in tensors.items() if name in lost}
    shards = [replace(shard, tensors={n: moved.get(n, s) for n, s in shard.tensors.items()}) for shard in model.shards]
    return replace(model, shards=tuple(shards), specs={**model.specs, **moved})


def _restore(lost: Lost, residual: Residual, spec: TensorSpec, recorded: str | None, target: int, offset: int) -> None:
    """Write a tensor of the base to its place; raise `WrongBase` unless it has its recorded digest."""
    spec = replace(spec, start=offset, stop=offset + spec.nbytes)
    restored = write_pieces(lost_bytes(lost, residual), lost.name, spec, target, residual.path)
    if recorded is not None and restored != recorded:
        raise WrongBase(
            f"{residual.path}: tensor {lost.name} was not restored: digest {restored}, recorded {recorded}",
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )
