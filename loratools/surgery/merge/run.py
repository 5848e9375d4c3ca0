"""Run a merge that is decided: write its files of tensors, measure them, then everything beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from loratools.engine.device import check as check_device
from loratools.engine.plan import MergePlan
from loratools.engine.residual.keep import Kept, keep
from loratools.engine.run import Settings, write_weights
from loratools.engine.task import TensorResult
from loratools.errors import IncompatibleAdapter, NoSpace
from loratools.format.record import TOOL
from loratools.parallel import Progress, no_progress
from loratools.storage import atomic, digest
from loratools.surgery.hash import hash_tensors
from loratools.surgery.merge.accounts import Account
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.prepared import Merge
from loratools.surgery.merge.resume import Journal, fingerprint


class Sink(Protocol):
    """Takes the finished shards of a model that is being written, then everything beside them (`hub/stream.py`)."""

    def shard(self, path: Path) -> None:
        """Take one finished file of tensors; its data may be gone from the folder afterwards."""
        ...

    def finish(self, message: str) -> object:
        """Take what lies beside the shards; the folder is complete."""
        ...


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. `retention` is ⟨W' − W, ΔW⟩/‖ΔW‖² in total, `by_tensor` the same for each changed tensor.

    `consumed` says for each adapter what became of its tensors: all of them are applied, replaced or passed over.
    `residual` is what it takes to restore the base exactly, where that was kept; `reused` are the files that an
    interrupted run had completed.
    """

    output: str
    changed: int
    tensors: int
    bytes_written: int
    verified: int
    adapters: list[dict[str, Any]]
    retention: float | None
    by_tensor: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    consumed: tuple[Account, ...] = ()
    residual: Kept | None = None
    reused: tuple[str, ...] = ()


def execute(
    prepared: Merge, *, progress: Progress | None = None, sink: Callable[[Path], Sink] | None = None
) -> MergeReport:
    """Run a prepared merge, and return its report.

    `progress` is that of `merge`. `sink` makes, for the folder being written, what takes each finished shard. Raises
    what `merge` raises.
    """
    plan, options, threads = prepared.plan, prepared.options, prepared.threads
    progress = progress or no_progress
    check_device(options.device)
    if options.keep_residual and plan.base.origins:
        raise IncompatibleAdapter(
            "a residual restores the tensors of a base one by one, and this merge repeats its layers",
            hint="Merge without --keep-residual; `unmerge --base` leads back.",
        )
    size = sum(file.size for file in plan.files)
    free = shutil.disk_usage(prepared.output.absolute().parent).free
    if size > free and not sink and not options.resume:
        raise NoSpace(
            f"{prepared.output}: the result takes {size} bytes, the disk has {free} free; nothing was written"
        )
    settings = Settings(threads, options.device, options.retention, options.seed, options.rounding)
    key = fingerprint(plan, settings) if options.resume else None
    with atomic.new_folder(prepared.output, force=options.force, key=key) as scratch:
        sent = sink(scratch) if sink else None
        journal = Journal(scratch, key) if key else None
        reused = tuple(journal.done) if journal else ()

        def finished(path: Path, measured: list[TensorResult]) -> None:
            if journal:
                journal.add(path, measured)
            if sent:
                sent.shard(path)

        remaining = replace(plan, files=tuple(file for file in plan.files if file.name not in reused))
        progress(sum(file.size for file in plan.files if file.name in reused))
        results = write_weights(remaining, scratch, settings, progress, finished if sent or journal else None)
        results = journal.close() if journal else results
        retained, total = sum(r.retained for r in results), sum(r.total for r in results)
        rate = retained / total if total else None
        changed = [result for result in results if result.digests and result.name in plan.base.specs]
        digests = {plan.base.origin(result.name): result.digests[digest.DEFAULT] for result in changed}
        record = prepared.record | {"base": prepared.record["base"] | {"tensors": digests}, "retention": rate}
        if options.rounding == "stochastic":
            record |= {"rounding": {"method": options.rounding, "seed": options.seed}}
        kept = keep(plan, scratch, threads, progress) if options.keep_residual else None
        if kept:
            record["base"]["root"] = _root(plan, digests, threads)
        write_companions(plan, prepared.sources, record, scratch)
        if sent:
            sent.finish(f"Merge {len(plan.inputs)} adapter(s) with {TOOL}")
    return MergeReport(
        output=str(prepared.output),
        changed=len(plan.touched()),
        tensors=len(plan.changes),
        bytes_written=size,
        verified=sum(bool(plan.changes[r.name].expected) and not r.warnings for r in results),
        adapters=prepared.record["adapters"],
        retention=rate,
        by_tensor={r.name: r.retained / r.total for r in results if r.total},
        notes=plan.notes,
        warnings=tuple(warning for result in results for warning in result.warnings),
        consumed=prepared.accounts,
        residual=kept,
        reused=reused,
    )


def _root(plan: MergePlan, known: Mapping[str, str], threads: int) -> str:
    """Return the root hash of the base; `known` are the digests that the merge has worked out already."""
    rest = {name: spec for name, spec in plan.base.specs.items() if name not in known}
    return digest.root({**known, **hash_tensors(rest, digest.DEFAULT, threads)})
