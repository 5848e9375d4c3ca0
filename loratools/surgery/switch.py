"""Take adapters out of a merged model and put others in, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loratools.adapter.input import AdapterInput
from loratools.adapter.placement.settle import equal
from loratools.decisions import decided
from loratools.engine.residual import Lost, Residual
from loratools.engine.residual.keep import Kept, keep
from loratools.engine.residual.restore import lost_bytes, write_pieces
from loratools.errors import IncompatibleAdapter, InvalidOption, WrongBase
from loratools.format.record import BROUGHT, is_in_file, refuse_second_merge
from loratools.options import CheckBase, Options, Tied
from loratools.parallel import Progress, each, no_progress
from loratools.storage import atomic, digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RESIDUAL
from loratools.storage.header import TensorSpec, nbytes
from loratools.storage.layout import plan_file
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location, session
from loratools.surgery.base import prove
from loratools.surgery.hash import hash_tensors
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Weights,
    as_asked,
    check_weights,
    open_adapters,
    places,
    places_of,
    planned,
    typed_model,
)
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.prepare import Account, Merge, decide
from loratools.surgery.merge.run import write_tensors
from loratools.surgery.merge.single import is_single, new_model
from loratools.surgery.unmerge.merged import MergedModel
from loratools.surgery.unmerge.subtract import subtract

_APPROXIMATE = "approximate: W' − ΔW_out + ΔW_in, for no residual of the merge was kept"


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """What became of a model. `exact` says that the result is what merging the new adapters into the base would give.

    Else `error_bound` limits how far any element is from that, through all switches since the merge. `residual` is what
    the next switch will restore the base from, where that was kept. The other fields are those of `MergeReport`, of the
    adapters that were put in.
    """

    output: str
    exact: bool
    changed: int
    tensors: int
    error_bound: float
    retention: float | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    consumed: tuple[Account, ...] = ()
    residual: Kept | None = None
    left_behind: tuple[str, ...] = ()


@session()
def switch(
    model: ModelSource,
    out: AdapterSource | Sequence[AdapterSource],
    into: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    weights: Weights = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    model_type: str | None = None,
    tied: Tied | None = None,
    check_base: CheckBase = "strict",
    keep_residual: bool | None = None,
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> SwitchReport:
    """Write a merged model with the adapters `out` replaced by the adapters `into`.

    With the residual of the merge each tensor is restored, compared with its recorded digest, and merged anew; the hash
    of all proves the base. The result is that of a merge into the base, and keeps a residual in turn, so that the
    hundredth switch is exact too. Without it, W'' = W' − ΔW_out + ΔW_in in float32, rounded once, is within
    2^-p·(|W'| + |W''|) of W + ΔW_in, p the bits of the dtype's mantissa, plus the error of the float32 sums, and the
    report calls it approximate; the bounds of several such switches add up.

    Args:
        model: The merged model: a path, an `hf://` reference, or an open `Checkpoint`.
        out: The adapters to take out, one or several; with a residual every adapter of the merge.
        into: The adapters to put in, one or several.
        output: The folder to write, or one file (`out.safetensors`), as for `merge`; it must not exist, unless `force`.
        weights: A number for each adapter of `into`; one number for one adapter. Default: 1 for each.
        include: Patterns of the modules of `into` that count, as for `merge`. Default: all.
        exclude: Patterns of those that are left out. Default: none.
        dialect: The dialect to read paths as. Default: what is found in each file.
        alpha: The alpha of training, which wins over what files record. Default: the file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        tied: What a change of an embedding does to a tied head, as for `merge`. Default: what it did at the merge.
        check_base: What happens where the base is not the one that a new adapter was sealed with: `"strict"` raises,
            `"warn"` reports, `"off"` compares nothing. Without a residual the record of the merge is asked about
            tensors that it changed. Default: `"strict"`.
        keep_residual: Whether the result keeps a residual, which takes one beside the model. Default: if there is one.
        threads: Threads to work with; no byte depends on it. Default: one per core, at most 8.
        force: Whether to replace an output that exists. Default: no.
        durable: Whether the output is on the disk itself before it has its name, as for `merge`. Default: no.
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
    checked = Options()
    if tied is not None:
        checked.word("tied", tied, Tied)
    if keep_residual is not None:
        checked.flag("keep_residual", keep_residual)
    checked.word("check_base", check_base, CheckBase).threads(threads).flag("force", force)
    checked.flag("durable", durable).done()
    out, _ = as_asked(out, None, None, None, dialect, alpha)
    into, weights = as_asked(into, weights, include, exclude, dialect, alpha, model_type)
    check_weights(into, weights)
    output, progress = Path(output), progress or no_progress
    atomic.check_output(output, force=force)
    merged = MergedModel.open(typed_model(model, model_type), out, None)
    inputs = open_adapters(into, merged.model, weights)
    merged.check_layers(inputs)
    atomic.refuse_inputs(output, [*places_of(merged.model), *places(merged.inputs), *places(inputs)])
    refuse_second_merge(merged.model, [each.digest for each in inputs], [each.digest for each in merged.inputs])
    residual = merged.residual()
    if keep_residual and residual is None:
        raise InvalidOption(
            f"{merged.model.path}: there is no {RESIDUAL}, so no base to keep a residual of",
            hint="Merge with --keep-residual into the base; from there on every switch keeps it.",
        )
    options = MergeOptions(
        tied=tied or merged.tied or "error", check_base=check_base, threads=threads, force=force, durable=durable,
        keep_residual=residual is not None and keep_residual is not False,
    )  # fmt: skip
    decided("%s: %s residual; a tied head: %s", merged.model.path, "by its" if residual else "without a", options.tied)
    planned("switch", output, [merged.model.path, *merged.inputs, *inputs], nbytes=merged.model.nbytes,
            tensors=len(merged.model.specs), exact=bool(residual), tied=options.tied)  # fmt: skip
    single = is_single(output, merged.model)
    with new_model(output, single=single, force=force, durable=durable) as scratch:
        if residual is not None:
            return _Exact(merged, residual, scratch).run(inputs, output, options, progress)
        done = subtract(merged, inputs, options, output, progress, scratch)
    plan = done.prepared.plan
    return SwitchReport(
        atomic.spelled(output), False, len(plan.touched()), len(plan.changes), done.bound, done.measured.retention,
        (_APPROXIMATE, *done.notes), done.measured.warnings, done.prepared.accounts[: len(inputs)],
        left_behind=done.prepared.beside.left,
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Restorer:
    """Restores one tensor of the base; its digest is known afterwards. Raises `WrongBase` unless it is the recorded."""

    lost: Lost
    residual: Residual
    recorded: str | None
    digest: str | None = None

    def __call__(self, target: int, offset: int) -> None:
        """Write its bytes to an open file."""
        lost, where = self.lost, self.residual.path
        spec = TensorSpec(lost.dtype, lost.shape, where, offset, offset + nbytes(lost.dtype, lost.shape))
        self.digest = write_pieces(lost_bytes(lost, self.residual), lost.name, spec, target, where)
        if self.recorded is not None and self.digest != self.recorded:
            raise WrongBase(
                f"{where}: tensor {lost.name} was not restored: digest {self.digest}, recorded {self.recorded}",
                hint="One of the files was changed since, or the residual belongs to another merge.",
            )

    def equals(self, folder: Path, copy: LazyTensor) -> bool:
        """Tell whether an adapter's copy is this tensor."""
        with files.temporary(folder, ".restored-") as (target, path):
            self(target, 0)
            size = nbytes(self.lost.dtype, self.lost.shape)
            return equal(copy, TensorSpec(self.lost.dtype, self.lost.shape, path, 0, size))


class _Exact:
    """A switch through the base: what the merge changed is restored where it will lie in the output."""

    def __init__(self, merged: MergedModel, residual: Residual, scratch: Path) -> None:
        merged.check_complete()
        self.merged, self.residual, self.scratch = merged, residual, scratch
        recorded = merged.below.tensors
        self.lost = merged.lost(residual)
        self.restorers = {n: _Restorer(tensor, residual, recorded.get(n)) for n, tensor in self.lost.items()}

    def run(
        self, inputs: Sequence[AdapterInput], output: Path, options: MergeOptions, progress: Progress
    ) -> SwitchReport:
        """Merge anew into the base, and return the report."""
        elsewhere = {name: partial(restorer.equals, self.scratch) for name, restorer in self.restorers.items()}
        prepared = decide(self._base(), inputs, output, options, elsewhere=elsewhere)
        atomic.check_space(output, sum(file.size for file in prepared.plan.files))
        prepared, before = self._in_place(prepared)
        brought = [*self.merged.tell_brought(prepared.beside), *prepared.beside.brought]
        measured = write_tensors(prepared, self.scratch, progress, before=before)
        measured.tell(options, self.scratch)
        plan, threads = prepared.plan, prepared.threads
        kept = None
        if options.keep_residual:
            kept = keep(plan, self.scratch, threads, progress, before=self.restorers, below=self.residual)
        digests = self._digests(measured.digests, plan.base, threads)
        prove(self.merged.record, digests, self.merged.model.path)
        of_base = {**self.merged.record["base"], "tensors": {name: digests[name] for name in measured.digests}}
        kinds = {name: self.merged.record[name] for name in ("model_type",) if name in self.merged.record}
        record = {**prepared.record, **kinds, "base": of_base, "retention": measured.retention}
        write_companions(plan, prepared.beside, record | ({BROUGHT: brought} if brought else {}), self.scratch)
        return SwitchReport(
            atomic.spelled(output), True, len(plan.touched().keys() | self.lost.keys()), len(plan.changes), 0.0,
            measured.retention, plan.notes, measured.warnings, prepared.accounts, kept, prepared.beside.left,
        )  # fmt: skip

    def _base(self) -> Checkpoint:
        """Return the base as if it were opened; where its lost tensors will lie is not known yet."""
        model, residual = self.merged.model, self.residual
        if is_in_file(model):  # whatever the files of the base were called
            residual = residual.as_one(model.shards[0].path.name)
        described = {Path(file.name): list(file.tensors) for file in residual.layout}
        stored = any(tensor.mode == "stored" for tensor in self.lost.values())
        own = {shard.path.relative_to(model.root): shard for shard in model.shards}
        same = described == {path: shard.layout for path, shard in own.items()}
        if not same or residual.config or stored:
            raise IncompatibleAdapter(
                f"{model.path}: the merge changed its layout or config.json besides its numbers, so one pass does not "
                "do",
                hint="Run `loratools unmerge`, then `loratools merge`.",
            )
        plans = [plan_file(str(path), shard.layout, header=shard.header()) for path, shard in own.items()]
        places = {name: spec for file in plans for name, spec in file.specs(self.scratch).items()}
        moved = {name: spec for name, spec in places.items() if name in self.lost}
        shards = [
            replace(shard, tensors={n: moved.get(n, spec) for n, spec in shard.tensors.items()})
            for shard in model.shards
        ]
        return replace(model, shards=tuple(shards), specs={**model.specs, **moved})

    def _in_place(self, prepared: Merge) -> tuple[Merge, dict[str, _Restorer]]:
        """Let lost tensors be read where they will lie in the output; return who restores them there.

        A head that is given a weight of its own is another tensor made of the embedding, which is restored there too.
        """
        plan = prepared.plan
        places = {name: spec for file in plan.files for name, spec in file.specs(self.scratch).items()}
        named = {plan.base.specs[name]: name for name in self.lost}
        changes, before, specs = dict(plan.changes), {}, dict(plan.base.specs)
        for name, change in plan.changes.items():
            if change.replaced or change.source not in named:
                continue
            lost = named[change.source]
            changes[name] = replace(change, source=places[name])
            before[name] = replace(self.restorers[lost]) if name != lost else self.restorers[lost]
            specs |= {name: places[name]} if name == lost else {}
        plan = replace(plan, changes=changes, base=replace(plan.base, specs=specs))
        return replace(prepared, plan=plan), before

    def _digests(self, measured: Mapping[str, str], base: Checkpoint, threads: int) -> dict[str, str]:
        """Return the digest of every tensor of the base: those restored, those read, and the rest."""
        unread = {name: restorer for name, restorer in self.restorers.items() if restorer.digest is None}

        def read(name: str, restorer: _Restorer) -> None:
            with files.temporary(self.scratch, ".restored-") as (target, _):
                restorer(target, 0)

        each(read, unread, threads)
        restored = {name: restorer.digest for name, restorer in self.restorers.items() if restorer.digest}
        known = {**measured, **restored}
        rest = {name: spec for name, spec in base.specs.items() if name not in known}
        return known | hash_tensors(rest, digest.DEFAULT, threads)
