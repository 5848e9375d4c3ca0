"""Merge adapters into a base model: W' = W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ in float32, rounded once, streamed shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.engine import products
from loratools.engine.device import check as check_device
from loratools.engine.plan import MergePlan
from loratools.engine.residual.keep import Kept, keep
from loratools.engine.run import Settings, write_weights
from loratools.engine.tensor import TensorResult
from loratools.errors import IncompatibleAdapter, NoSpace, OutputRefused
from loratools.format.digest import checked_digest
from loratools.parallel import Progress, cores
from loratools.storage import atomic, digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD, companions, own_config
from loratools.surgery.hash import hash_tensors
from loratools.surgery.merge import folder
from loratools.surgery.merge.accounts import Account, accounts
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.merge.resume import Journal, fingerprint
from loratools.surgery.record import TOOL, merge_record, refuse_second_merge


class Sink(Protocol):
    """Takes the finished shards of a model that is being written, then everything beside them (`hub/stream.py`)."""

    def shard(self, path: Path) -> None:
        """Take one finished file of tensors; its data may be gone from the folder afterwards."""
        ...

    def finish(self, message: str) -> object:
        """Take what lies beside the shards; the folder is complete."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge that is decided but not run: the inputs, the plan, and what the output will record of itself."""

    plan: MergePlan
    output: Path
    sources: dict[str, Path]
    record: dict[str, Any]
    digests: tuple[str, ...]
    threads: int
    accounts: tuple[Account, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the free space where the output goes."""
        free = shutil.disk_usage(self.output.absolute().parent).free
        return self.plan.to_json(self.threads, torch=not products.serves(self.plan)) | {
            "output": str(self.output),
            "other_files": len(self.sources),
            "free_disk": free,
            "threads": self.threads,
            "consumed": [asdict(account) for account in self.accounts],
        }


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


def prepare(
    base: str | Path | Checkpoint,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tied: str = "error",
    check_base: str = "strict",
    threads: int | None = None,
    force: bool = False,
    model_type: str | None = None,
) -> Merge:
    """Decide everything about a merge from headers and the adapters' digests; write nothing.

    `model_type` says what the base is where its config.json does not, and shapes leave open how a weight lies.

    Raises `IncompatibleAdapter`, `WrongBase`, `BadFile`, `UnsupportedAdapter`, `OutputRefused` (the output exists, is
    an input, or the base already holds this adapter); `ValueError` if there is not one weight for each adapter.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapter(s) and {len(weights)} weight(s); each adapter takes one weight")
    output = Path(output)
    atomic.check_output(output, force=force)
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    base = replace(base, config={**base.config, "model_type": model_type}) if model_type else base
    opened = [one if isinstance(one, Adapter) else dialects.open_adapter(one, base=base) for one in adapters]
    base = replicated(base, opened)
    paths = [None if isinstance(adapter, Adapter) else Path(adapter) for adapter in adapters]
    # By their own places too: an adapter may come opened, and the files of a base may be links.
    own = {lazy.spec.file for adapter in opened for lazy in adapter.tensors().values() if lazy.spec}
    own |= {shard.path for shard in base.shards}
    _refuse_inputs(output, [base.path, base.root if base.path.is_dir() else None, *paths, *sorted(own)])
    digests = tuple(checked_digest(a, str(p or "adapter")) for a, p in zip(opened, paths, strict=True))
    refuse_second_merge(base, digests, RECORD)
    named = [named_for(one, base) for one in opened]
    settled, decided = settle(base, named, strict=check_base == "strict")
    plan = plan_merge(
        base, settled, weights, dtype=dtype, max_shard_size=max_shard_size, tied=tied, check_base=check_base,
        configs=[own_config(path) for path in paths],
    )  # fmt: skip
    plan = replace(plan, notes=(*plan.notes, *decided))
    sources = companions(base, paths)
    record = merge_record(base, opened, weights, digests)
    record |= {"dtype": dtype, "tied": tied if tied != "error" else None}
    threads = threads or min(8, cores())
    return Merge(plan, output, sources, record, digests, threads, tuple(accounts(plan, opened)))


def merge(
    base: str | Path | Checkpoint,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    device: str = "cpu",
    retention: str = "sample",
    seed: int = 0,
    rounding: str = "nearest",
    keep_residual: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress = lambda _: None,
    **options: Any,
) -> MergeReport:
    """Merge adapters into a base model and write the result as a new folder.

    W' = W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ, accumulated in float32 (float64 for a float64 base) and rounded once, to nearest even, to
    the base's dtype. `options` are those of `prepare`. `device` is `cpu` or `cuda` (`engine/device.py` says what may
    differ). `retention` is `sample`, `full` or `off`; `seed` chooses the sampled tiles. `rounding="stochastic"` rounds
    BF16 and F16 up or down at random, by `seed` (`engine/stochastic.py`). Untouched tensors are copied byte for byte;
    the output appears only when it is complete. `keep_residual` writes beside them what rounding destroyed
    (`engine/residual`) and records the base's root hash. With `resume` an interruption leaves the files that are
    complete, and the same call goes on from there.

    Raises what `prepare` raises, `WrongBase` when a tensor read is not the recorded one, `NoSpace`, and `NoDevice`.
    """
    prepared = prepare(base, adapters, output, force=force, **options)
    return execute(
        prepared, device=device, retention=retention, seed=seed, rounding=rounding,
        keep_residual=keep_residual, force=force, resume=resume, progress=progress,
    )  # fmt: skip


def execute(
    prepared: Merge,
    *,
    device: str = "cpu",
    retention: str = "sample",
    seed: int = 0,
    rounding: str = "nearest",
    keep_residual: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
    sink: Callable[[Path], Sink] | None = None,
    resume: bool = False,
) -> MergeReport:
    """Run a prepared merge; see `merge`. `sink` makes, for the folder being written, what takes each finished shard."""
    plan = prepared.plan
    check_device(device)
    if keep_residual and plan.base.origins:
        raise IncompatibleAdapter(
            "a residual restores the tensors of a base one by one, and this merge repeats its layers",
            hint="Merge without --keep-residual; `unmerge --base` leads back.",
        )
    size = sum(file.size for file in plan.files)
    free = shutil.disk_usage(prepared.output.absolute().parent).free
    if size > free and not sink and not resume:
        raise NoSpace(
            f"{prepared.output}: the result takes {size} bytes, the disk has {free} free; nothing was written"
        )
    settings = Settings(prepared.digests, prepared.threads, device, retention, seed, rounding)
    key = fingerprint(plan, settings) if resume else None
    with atomic.new_folder(prepared.output, force=force, key=key) as scratch:
        sent = sink(scratch) if sink else None
        journal = Journal(scratch, key) if key else None
        reused = tuple(journal.done) if journal else ()

        def finished(path: Path, measured: list[TensorResult]) -> None:
            if journal:
                journal.add(path, measured)
            if sent:
                sent.shard(path)

        left = replace(plan, files=tuple(file for file in plan.files if file.name not in reused))
        progress(sum(file.size for file in plan.files if file.name in reused))
        results = write_weights(left, scratch, settings, progress, finished if sent or journal else None)
        results = journal.close() if journal else results
        retained, total = sum(r.retained for r in results), sum(r.total for r in results)
        rate = retained / total if total else None
        changed = [result for result in results if result.digests and result.name in plan.base.specs]
        digests = {plan.base.origin(result.name): result.digests[digest.DEFAULT] for result in changed}
        record = prepared.record | {"base": prepared.record["base"] | {"tensors": digests}, "retention": rate}
        if rounding == "stochastic":
            record |= {"rounding": {"method": rounding, "seed": seed}}
        kept = keep(plan, scratch, prepared.threads, progress) if keep_residual else None
        if kept:
            record["base"]["root"] = _root(plan, digests, prepared.threads)
        folder.write_companions(plan, prepared.sources, record, scratch)
        if sent:
            sent.finish(f"Merge {len(prepared.digests)} adapter(s) with {TOOL}")
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


def _refuse_inputs(output: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse an output that is an input, lies in one, or holds one: replacing it would destroy what is read."""
    target = output.resolve()
    for path in inputs:
        if path is None:
            continue
        source = path.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputRefused(f"{output} is, holds or lies in the input {path}", hint="Choose another output.")
