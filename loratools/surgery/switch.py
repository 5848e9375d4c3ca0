"""Take adapters out of a merged model and put others in, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.placement.image import named_for
from loratools.engine.residual import Lost, Residual
from loratools.engine.residual.restore import Restorer, file_plan, lost_tensors
from loratools.engine.run import Settings, write_weights
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.format.digest import checked_digest
from loratools.options import CheckBase
from loratools.parallel import Progress, cores
from loratools.storage import atomic, digest, files
from loratools.storage.atomic import refuse_inputs
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import companions
from loratools.storage.header import TensorSpec
from loratools.storage.layout import Slot
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.record import merge_record
from loratools.surgery.unmerge.merged import Merged, check_sums, error_bound


@dataclass(frozen=True, slots=True)
class Switch:
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


@dataclass(frozen=True, slots=True, eq=False)
class _New:
    """The adapters that are put in, under the model's names; `digests` are those of the adapters as they were read."""

    adapters: tuple[Adapter, ...]
    paths: tuple[Path | None, ...]
    weights: tuple[float, ...]
    digests: tuple[str, ...]


def switch(
    model: str | Path,
    out: Sequence[str | Path | Adapter],
    into: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    check_base: CheckBase = "strict",
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Switch:
    """Write a merged model with the adapters `out` replaced by `into`, which are merged with `weights`.

    With the residual of the merge each tensor is restored, held against its recorded digest, and merged anew: the
    result is that of a merge into the base. Without it, W'' = W' − ΔW_out + ΔW_in in float32, rounded once, is within
    2^-p·(|W'| + |W''|) of W + ΔW_in, and is said to be approximate.

    Raises what `unmerge` and `merge` raise; `IncompatibleAdapter` also where the merge changed more than numbers (a new
    head, a larger vocabulary), which takes `unmerge` and `merge` one after the other.
    """
    output = Path(output)
    atomic.check_output(output, force=force)
    merged = Merged.open(model, out, None)
    merged.check_layers()
    paths = tuple(None if isinstance(one, Adapter) else Path(one) for one in into)
    refuse_inputs(output, [merged.model.path, *paths])
    base = merged.model
    opened = tuple(one if isinstance(one, Adapter) else dialects.open_adapter(one, base=base) for one in into)
    weights = [1.0] * len(opened) if weights is None else list(weights)
    if not opened or len(weights) != len(opened):
        raise ValueError(f"{len(opened)} adapter(s) and {len(weights)} weight(s); each adapter takes one weight")
    digests = tuple(checked_digest(a, str(p or "adapter")) for a, p in zip(opened, paths, strict=True))
    named = tuple(named_for(one, base) for one in opened)
    new = _New(named, paths, tuple(map(float, weights)), digests)
    residual = merged.residual()
    work = _approximate if residual is None else partial(_exact, residual, check_base)
    with atomic.new_folder(output, force=force) as scratch:
        return work(merged, new, threads or cores(), progress, output, scratch)


def _exact(
    residual: Residual,
    check_base: CheckBase,
    merged: Merged,
    new: _New,
    threads: int,
    progress: Progress,
    output: Path,
    scratch: Path,
) -> Switch:
    merged.check_complete()
    lost = lost_tensors(merged.model, residual, merged.adapters, merged.weights, merged.record.get("tied") or "error")
    base, slots = _as_it_was(merged.model, residual, lost, scratch)
    plan = plan_merge(base, new.adapters, new.weights, MergeOptions(check_base=check_base))
    recorded: Mapping[str, str] = merged.record["base"]["tensors"]
    before = {name: partial(_put_back, one, residual, slots[name], recorded) for name, one in lost.items()}
    results = write_weights(plan, scratch, Settings(new.digests, threads, before=before), progress)
    total = sum(result.total for result in results)
    retention = sum(result.retained for result in results) / total if total else None
    record: dict[str, Any] = merge_record(base, new.adapters, new.weights, new.digests)
    known = {r.name: r.digests[digest.DEFAULT] for r in results if r.digests}
    record |= {"base": {**merged.record["base"], "tensors": known}, "tied": None, "dtype": None, "retention": retention}
    write_companions(plan, companions(merged.model, new.paths), record, scratch)
    changed = len(plan.touched().keys() | lost.keys())
    return Switch(str(output), True, changed, len(plan.changes), 0.0, retention, plan.notes)


def _as_it_was(
    model: Checkpoint, residual: Residual, lost: Mapping[str, Lost], scratch: Path
) -> tuple[Checkpoint, dict[str, Slot]]:
    """Return the base as if it were opened, with lost tensors where they will be put back, and their slots."""
    plans = {file.name: file_plan(model, file) for file in residual.layout}
    shards = {str(shard.path.relative_to(model.root)): shard for shard in model.shards}
    laid_out = {name: [(slot.name, slot.dtype, slot.offset) for slot in plan.slots] for name, plan in plans.items()}
    same = laid_out == {
        name: [(tensor, spec.dtype, spec.start) for tensor, spec in shard.tensors.items()]
        for name, shard in shards.items()
    }
    if not same or residual.config or any(one.mode == "stored" for one in lost.values()):
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
    made = tuple(replace(shard, tensors={name: specs[name] for name in shard.tensors}) for shard in model.shards)
    return replace(model, shards=made, specs=specs), slots


def _put_back(lost: Lost, residual: Residual, slot: Slot, recorded: Mapping[str, str], target: int) -> None:
    """Write a tensor of the base to its slot; raise `WrongBase` unless it has its recorded digest."""
    at, hasher = slot.offset, digest.start_tensor(lost.dtype, lost.shape)
    for piece in Restorer(lost, residual).pieces():
        hasher.update(piece)
        files.write_from(target, memoryview(piece), at)
        at += len(piece)
    found = digest.finish(hasher)
    if found != recorded.get(lost.name, found):
        raise WrongBase(
            f"{residual.path}: tensor {lost.name} did not come back: digest {found}, recorded {recorded[lost.name]}",
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )


def _approximate(merged: Merged, new: _New, threads: int, progress: Progress, output: Path, scratch: Path) -> Switch:
    model = merged.model
    weights = (*(-weight for weight in merged.weights), *new.weights)
    adapters = (*merged.adapters, *new.adapters)
    options = MergeOptions(tied=merged.record.get("tied") or "error", check_base="off")
    plan = plan_merge(model, adapters, weights, options)
    check_sums(plan)
    digests = (*merged.digests, *new.digests)
    results = write_weights(plan, scratch, Settings(digests, threads, retention="off"), progress)
    bound = max((error_bound(plan, scratch, result.name) for result in results), default=0.0)
    record = merge_record(model, adapters, weights, digests)
    record |= {"operation": "switch", "approximate": True, "error_bound": bound}
    write_companions(plan, companions(model, new.paths), record, scratch)
    notes = (
        "approximate: W' − ΔW_out + ΔW_in, for no residual of the merge was kept",
        "no base hash of the new adapters was checked",
    )
    return Switch(str(output), False, len(plan.touched()), len(plan.changes), bound, None, notes)
