"""Run a merge that is decided: the files of tensors first, then everything beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loratools.adapter.placement.gguf import is_gguf
from loratools.engine.plan import MergePlan
from loratools.engine.run import Settings, write_weights
from loratools.engine.task import Restore, TensorResult
from loratools.errors import IncompatibleAdapter, LoraToolsError, counted
from loratools.format.record import TOOL, in_short
from loratools.parallel import Progress, no_progress
from loratools.storage import atomic, digest
from loratools.storage.checkpoint.logical import encodings
from loratools.storage.files import chunks
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan
from loratools.surgery.hash import hash_tensors, hashing
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.measured import Measured
from loratools.surgery.merge.prepare import Account, Merge
from loratools.surgery.merge.single import new_model

if TYPE_CHECKING:
    from loratools.engine.residual.keep import Kept
    from loratools.engine.residual.meanwhile import Meanwhile


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
    `recoded` has the same for each weight that became codes again, measured through the quantization, all of it.
    `loss_share` is the part of what the codes lost, ‖W' − W''‖², that the adapter beside the model gives back.
    `residual` is what it takes to restore the base exactly, where that was kept; `reused` are the files that an
    interrupted run had completed. `left_behind` are files of the base's folder that the output has not.
    """

    output: str
    changed: int
    tensors: int
    bytes_written: int
    verified: int
    adapters: list[dict[str, Any]]
    retention: float | None
    by_tensor: dict[str, float] = field(default_factory=dict)
    recoded: dict[str, float] = field(default_factory=dict)
    loss_share: float | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    consumed: tuple[Account, ...] = ()
    residual: Kept | None = None
    reused: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


def execute(
    prepared: Merge, *, progress: Progress | None = None, sink: Callable[[Path], Sink] | None = None,
    parts: Sequence[Path] = (), room: Path | None = None,
) -> MergeReport:  # fmt: skip
    """Run a prepared merge, and return its report.

    `progress` is that of `merge`. `sink` makes, for the folder or the one file that is being written, what takes each
    finished file of tensors. `parts` are folders with lists of what other processes have written of the same merge
    (`parts.py`) in the folder `room`: that is taken over. Raises what `merge` raises.
    """
    plan, options, threads = prepared.plan, prepared.options, prepared.threads
    progress = progress or no_progress
    if options.keep_residual and plan.base.origins:
        raise IncompatibleAdapter(
            "a residual restores the tensors of a base one by one, and this merge repeats its layers",
            hint="Merge without --keep-residual; `unmerge --base` leads back.",
        )
    size = sum(file.size for file in plan.files)
    if is_gguf(plan.base):
        return _execute_file(prepared, progress, size, sink)
    in_store = atomic.afar.is_afar(prepared.output)
    if not sink and not options.resume and not parts and (plan.single or not in_store):
        atomic.check_space(prepared.output, size)
    key = None
    if options.resume or parts or in_store:
        from loratools.surgery.merge.resume import Journal, fingerprint, tell_others

        key = fingerprint(plan, settings_of(prepared))
        tell_others(prepared.output, key)
    output = prepared.output
    with (
        new_model(output, single=plan.single, force=options.force, key=key, durable=options.durable) as scratch,
        _residual(plan, scratch, progress, wanted=options.keep_residual) as early,
        hashing(_untouched(plan) if options.keep_residual else {}, beside=threads > 1) as untouched,
    ):
        whole = scratch / plan.files[0].name if plan.single else scratch
        sent = sink(whole) if sink else None
        store = None if plan.single else atomic.afar.sender(scratch)
        elsewhere = store.kept if store else None
        journal = Journal(scratch, key, durable=store is None, elsewhere=elsewhere) if key else None
        if journal and room:
            journal.adopt(parts, room, plan.files)
        reused = journal.kept if journal else ()
        resumed = journal.tell(len(plan.files)) if journal and not parts else []

        def finished(file: FilePlan, measured: list[TensorResult]) -> None:
            if journal:
                journal.add(file, measured)
            if store and journal:
                store.shard(scratch / file.name, journal.done[file.name])
            if sent and not plan.single:
                sent.shard(scratch / file.name)

        remaining = replace(plan, files=tuple(file for file in plan.files if file.name not in reused))
        progress(sum(file.size for file in plan.files if file.name in reused))
        write = replace(prepared, plan=remaining)
        try:
            measured = write_tensors(
                write, scratch, progress, finished=finished if sent or journal else None, early=early
            )
        except BaseException as error:
            if journal and not store and not isinstance(error, LoraToolsError):  # which would come again
                journal.tell_left(len(plan.files))
            raise
        measured = Measured.of(plan, journal.close()) if journal else measured
        measured.tell(options, scratch)
        digests = measured.digests | hash_tensors(_codes(plan), digest.DEFAULT, threads)
        of_base = {**prepared.record["base"], "tensors": digests}
        record = prepared.record | {"base": of_base, "retention": measured.retention}
        if options.rounding == "stochastic":
            record["rounding"] = {"method": options.rounding, "seed": options.seed}
        share = _keep_loss(plan, measured, scratch, options.keep_loss) if options.keep_loss else None
        kept = _keep_residual(plan, scratch, threads, progress, early) if early else None
        if kept:
            every, known = (plan.base.stored or plan.base).specs, untouched() | digests
            rest = {name: spec for name, spec in every.items() if name not in known}
            of_base["root"] = digest.root(known | hash_tensors(rest, digest.DEFAULT, threads))
        write_companions(plan, prepared.beside, record, scratch)
        if sent and plan.single:  # its header is known now
            sent.shard(whole)
        if sent:
            sent.finish(_commit_title(plan))
    return MergeReport(
        output=atomic.spelled(prepared.output), changed=len(plan.touched()), tensors=plan.tensors, bytes_written=size,
        verified=measured.verified, adapters=in_short(prepared.record), consumed=prepared.accounts,
        notes=(*plan.notes, *resumed), warnings=measured.warnings, retention=measured.retention,
        by_tensor=measured.by_tensor, recoded=measured.recoded, loss_share=share, residual=kept,
        reused=() if parts else reused, left_behind=prepared.beside.left,
    )  # fmt: skip


def _keep_loss(plan: MergePlan, measured: Measured, scratch: Path, rank: int) -> float | None:
    from loratools.surgery.merge import loss

    return loss.write(plan, measured.results, scratch, rank)


@contextmanager
def _residual(plan: MergePlan, scratch: Path, progress: Progress, *, wanted: bool) -> Iterator[Meanwhile | None]:
    """Give what codes the residual of the merge beside it, if that is `wanted`."""
    if not wanted:
        yield None
        return
    from loratools.engine.residual.meanwhile import meanwhile

    with meanwhile(plan, scratch, progress) as early:
        yield early


def _keep_residual(plan: MergePlan, scratch: Path, threads: int, progress: Progress, early: Meanwhile) -> Kept:
    from loratools.engine.residual.keep import keep

    return keep(plan, scratch, threads, progress, early=early.early)


def _execute_file(prepared: Merge, progress: Progress, size: int, sink: Callable[[Path], Sink] | None) -> MergeReport:
    """Run a merge into one GGUF file: `prepared.output`, or in a folder of that name the file as the base calls it."""
    plan, options = prepared.plan, prepared.options
    atomic.check_space(prepared.output, size)
    with atomic.new_output(prepared.output, plan.files[0].name, force=options.force) as path:
        write = replace(prepared, plan=replace(plan, files=(replace(plan.files[0], name=path.name),)))
        measured = write_tensors(write, path.parent, progress)
        measured.tell(options, path.parent)
        if sink:
            sent = sink(path)
            sent.shard(path)
            sent.finish(_commit_title(plan))
    return MergeReport(
        output=atomic.spelled(prepared.output), changed=len(plan.touched()), tensors=plan.tensors, bytes_written=size,
        verified=measured.verified, adapters=in_short(prepared.record), consumed=prepared.accounts,
        notes=plan.notes, warnings=measured.warnings, retention=measured.retention, by_tensor=measured.by_tensor,
        recoded=measured.recoded,
    )  # fmt: skip


def _commit_title(plan: MergePlan) -> str:
    return f"Merge {counted(len(plan.inputs), 'adapter')} with {TOOL}"


def _codes(plan: MergePlan) -> dict[str, TensorSpec]:
    """Return the stored parts of the weights that the merge changes and the base has as codes, by name."""
    every = encodings(plan.base)
    modules = [every[name].module for name in plan.touched() if name in every]
    return {name: module.specs[part] for module in modules for part, name in module.names.items()}


def _untouched(plan: MergePlan) -> dict[str, TensorSpec]:
    """Return the tensors of the base that the merge neither changes nor hashes, by their names on disk."""
    hashed = plan.touched().keys() | _codes(plan).keys()
    return {name: spec for name, spec in (plan.base.stored or plan.base).specs.items() if name not in hashed}


def settings_of(
    prepared: Merge, before: Mapping[str, Restore] | None = None, early: Meanwhile | None = None
) -> Settings:
    """Return how the engine is to run a merge; `early` codes a residual beside it, `before` is that of `Settings`."""
    options = prepared.options
    return Settings(
        prepared.threads,
        options.computes_on,
        options.retention,
        options.seed,
        options.rounding,
        before=before or {},
        watch=early.watch if early else None,
    )


def write_tensors(
    prepared: Merge, scratch: Path, progress: Progress, *, before: Mapping[str, Restore] | None = None,
    finished: Callable[[FilePlan, list[TensorResult]], None] | None = None, early: Meanwhile | None = None,
) -> Measured:  # fmt: skip
    """Write the files of tensors of a merge into `scratch`, and return what was measured.

    `before` is that of `Settings`, `finished` that of `write_weights`; `early` codes the residual beside it.
    Raises what `merge` raises of numbers.
    """
    _refuse_not_finite(prepared.plan)
    results = write_weights(prepared.plan, scratch, settings_of(prepared, before, early), progress, finished)
    return Measured.of(prepared.plan, results)


def _refuse_not_finite(plan: MergePlan) -> None:
    """Raise `IncompatibleAdapter` with every tensor that an adapter replaces by one with NaN or infinity."""
    whole = [(name, change.source) for name, change in plan.changes.items() if change.replaced]
    if not whole:
        return
    from loratools.storage.codecs.floats import is_finite

    if odd := [name for name, spec in whole if not is_finite(chunks(spec), spec.dtype)]:
        raise IncompatibleAdapter(
            f"NaN or infinite numbers in {counted(len(odd), 'tensor')} that an adapter replaces whole", sorted(odd),
            hint="The training diverged, or the file is damaged; such an adapter would destroy the model.",
        )  # fmt: skip
