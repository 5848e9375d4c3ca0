"""Decide a merge, which writes nothing; then run it: the files of tensors first, and everything beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from loratools.adapter.model import AdapterInput
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.adapter.placement.tied import EMBEDDINGS, main_tensor
from loratools.decisions import warned
from loratools.engine.device import check as check_device
from loratools.engine.plan import MergePlan
from loratools.engine.residual.keep import Kept, keep
from loratools.engine.run import Settings, in_torch, write_weights
from loratools.engine.task import TensorResult, retention
from loratools.errors import IncompatibleAdapter
from loratools.format.record import TOOL, of_merge, refuse_second_merge
from loratools.parallel import Progress, cores, no_progress
from loratools.storage import atomic, digest
from loratools.storage.beside import vocabulary
from loratools.storage.companions import Companions, companions, own_config
from loratools.storage.sources import Location
from loratools.surgery.hash import hash_tensors
from loratools.surgery.inputs import AdapterSource, ModelSource, open_adapters, open_model, places, under_names_of
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.merge.resume import Journal, fingerprint


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the tensors of one adapter; `tensors` is the sum of the other three.

    `applied` are parts of updates, `replaced` took the place of a tensor or were added, `passed_over` are copies of the
    base's own tensors, and a tied head's copy of the embedding.
    """

    tensors: int
    applied: int
    replaced: int
    passed_over: int


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge that is decided but not run: the inputs, the plan, and what the output will record of itself."""

    plan: MergePlan
    output: Path
    beside: Companions
    record: dict[str, Any]
    options: MergeOptions
    accounts: tuple[Account, ...]

    @property
    def threads(self) -> int:
        """Threads to work with, where the options leave it open one per core, at most 8."""
        return self.options.threads or min(8, cores())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the free space where the output goes."""
        return self.plan.to_json(self.threads, torch=bool(in_torch(self.plan))) | {
            "output": str(self.output),
            "other_files": len(self.beside.sources.keys() | self.beside.texts),
            "left_behind": list(self.beside.left),
            "free_disk": atomic.free_space(self.output),
            "threads": self.threads,
            "consumed": [asdict(account) for account in self.accounts],
        }


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
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    consumed: tuple[Account, ...] = ()
    residual: Kept | None = None
    reused: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


def prepare(
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    weights: float | Sequence[float] | None = None,
    options: MergeOptions = MergeOptions(),  # noqa: B008  (frozen)
) -> Merge:
    """Decide everything about a merge from headers and the adapters' digests; write nothing.

    `base`, `adapters`, `output` and `weights` are those of `merge`; `options` holds its other arguments.

    Raises `IncompatibleAdapter`, `WrongBase`, `BadFile`, `UnsupportedAdapter`, `InvalidOption` for weights that are not
    one for each adapter, `OutputRefused` where the output exists, is an input, or the base already holds this adapter.
    """
    output = Path(output)
    atomic.check_output(output, force=options.force)
    base = open_model(base)
    if options.model_type:
        base = replace(base, config={**base.config, "model_type": options.model_type})
    inputs = open_adapters(adapters, base, weights)
    base = replicated(base, [each.adapter for each in inputs])
    # By the places of its files too: those of a base may be links.
    of_base = [base.path, *([base.root] if base.path.is_dir() else []), *(shard.path for shard in base.shards)]
    atomic.refuse_inputs(output, [*of_base, *places(inputs)])
    refuse_second_merge(base, [each.digest for each in inputs])
    settled, decided = settle(base, under_names_of(base, inputs), strict=options.check_base == "strict")
    plan = plan_merge(base, settled, options, configs=[own_config(each.path) for each in inputs])
    plan = replace(plan, notes=(*plan.notes, *decided))
    record = of_merge(base, inputs, plan.turned())
    record |= {"dtype": options.output_dtype, "tied": options.tied if options.tied != "error" else None}
    beside = companions(base, [each.path for each in inputs])
    _check_vocabulary(plan, beside)
    return Merge(plan, output, beside, record, options, tuple(_accounts(plan, inputs)))


def _check_casts(results: Sequence[TensorResult], options: MergeOptions) -> None:
    """Refuse infinities that a cast made, with every tensor that has some; warn of numbers that it made zero."""
    if overflowed := [result for result in results if result.overflowed]:
        problems = [f"{result.name}: {result.overflowed} number(s) beyond it" for result in overflowed]
        raise IncompatibleAdapter(
            f"numbers of {len(overflowed)} tensor(s) are larger than any that their new dtype holds, and would be "
            f"infinite in {options.output_dtype or 'the dtype of the base'}",
            problems,
            hint="Choose a dtype with a wider range: --dtype bf16 or f32.",
        )
    if flushed := sorted((result for result in results if result.flushed), key=lambda result: -result.flushed):
        warned(
            "%d number(s) of %d tensor(s) are too small for their new dtype and became zero, most of them in %s (%d)",
            sum(result.flushed for result in flushed), len(flushed), flushed[0].name, flushed[0].flushed,
        )  # fmt: skip


def _check_vocabulary(plan: MergePlan, beside: Companions) -> None:
    """Warn of a tokenizer with more tokens than the merged embedding has rows: their ids would lead out of it."""
    shapes = {name: change.source.shape for name, change in plan.changes.items()}
    embedding, count = main_tensor(shapes, EMBEDDINGS), vocabulary.tokens(beside.sources)
    if embedding and count > shapes[embedding][0]:
        warned(
            "the tokenizer has %d tokens, and %s has %d rows: ids from %d on are beyond the model",
            count, embedding, shapes[embedding][0], shapes[embedding][0],
        )  # fmt: skip


def _accounts(plan: MergePlan, inputs: Sequence[AdapterInput]) -> list[Account]:
    """Return what became of every tensor of the adapters, which are as they were opened, with copies and all.

    Raises `IncompatibleAdapter` if a part of an update has no place in the plan: nothing is dropped in silence.
    """

    def paths(module: str, parts: Iterable[str]) -> set[str]:
        return {f"{module.replace('.base_layer', '')}.{part}" for part in parts}

    placed: list[set[str]] = [set() for _ in inputs]
    for i, placement in (pair for change in plan.changes.values() for pair in change.placements):
        update = placement.update
        placed[i] |= paths(placement.module, update.parts.keys() - ({"lora_B.bias"} if update.bias is not None else ()))
    every, problems = [], []
    for i, (each, merged) in enumerate(zip(inputs, plan.adapters, strict=True)):
        parts = set().union(*(paths(module, update.parts) for module, update in merged.updates.items()))
        problems += [f"adapter {i + 1}: {path}" for path in sorted(parts - placed[i])]
        total = len(each.adapter.tensors()) + len(each.adapter.copies)
        applied = sum(len(update.parts) for update in each.adapter.updates.values())
        every.append(Account(total, applied, len(merged.replacements), total - applied - len(merged.replacements)))
    if problems:
        raise IncompatibleAdapter("tensors of the adapter have no place in the plan of the merge", problems)
    return every


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
    if not sink and not options.resume:
        atomic.check_space(prepared.output, size)
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
        _check_casts(results, options)
        specs = plan.base.specs
        hashed = [result for result in results if result.digests and result.name in specs]
        digests = {plan.base.origin(result.name): result.digests[digest.DEFAULT] for result in hashed}
        of_base = {**prepared.record["base"], "tensors": digests}
        record = prepared.record | {"base": of_base, "retention": retention(results)}
        if options.rounding == "stochastic":
            record["rounding"] = {"method": options.rounding, "seed": options.seed}
        kept = keep(plan, scratch, threads, progress) if options.keep_residual else None
        if kept:
            rest = {name: spec for name, spec in specs.items() if name not in digests}
            of_base["root"] = digest.root({**digests, **hash_tensors(rest, digest.DEFAULT, threads)})
        write_companions(plan, prepared.beside, record, scratch)
        if sent:
            sent.finish(f"Merge {len(plan.inputs)} adapter(s) with {TOOL}")
    return MergeReport(
        output=str(prepared.output), changed=len(plan.touched()), tensors=len(plan.changes), bytes_written=size,
        verified=sum(bool(plan.changes[r.name].expected) and not r.warnings for r in results),
        adapters=prepared.record["adapters"], consumed=prepared.accounts, notes=plan.notes,
        warnings=tuple(warning for result in results for warning in result.warnings),
        retention=retention(results), by_tensor={r.name: r.retained / r.total for r in results if r.total},
        residual=kept, reused=reused, left_behind=prepared.beside.left,
    )  # fmt: skip
