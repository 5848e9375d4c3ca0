"""Take adapters out of a merged model again: exactly from the base or the residual, else within a stated bound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter, NoSpace, OutputRefused, WrongBase
from loratools.storage import atomic, digest, dtypes, files
from loratools.storage.checkpoint import Checkpoint, read_json
from loratools.storage.header import TensorSpec
from loratools.surgery import candidates, companions, identity
from loratools.surgery.execute import Settings, write_weights
from loratools.surgery.hash import hash_tensors
from loratools.surgery.plan import MergePlan, plan_merge
from loratools.surgery.residual import Residual
from loratools.surgery.restore import copy_companions, lost_tensors, prove, restore
from loratools.surgery.verify import verify

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Unmerge:
    """What became of a model. `method` is `base`, `residual` or `approximate`.

    `proved` says by what the result is known to be the base: `root hash`, `tensor digests` or `verify`; None where it
    is not. `error_bound` limits |W̃ − W| of every element of an approximate result; it is 0 for an exact one.
    """

    output: str
    method: str
    tensors: int
    restored: int
    root: str | None
    proved: str | None
    error_bound: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A merged model, its record ({} if it has none), and its adapters in the order of the record, with weights."""

    model: Checkpoint
    record: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    left: tuple[str, ...]

    @classmethod
    def open(
        cls, path: str | Path, adapters: Sequence[str | Path | Adapter], weights: Sequence[float] | None
    ) -> Merged:
        """Open a merged model and find each adapter in its record by its digest.

        `left` are the digests of merged adapters that were not given. `weights` are for a model without a record;
        beside one they must be those recorded. Raises `IncompatibleAdapter` for an adapter that was not merged.
        """
        model = Checkpoint.open(path)
        opened = [one if isinstance(one, Adapter) else dialects.open_adapter(one) for one in adapters]
        if not opened or (weights is not None and len(weights) != len(opened)):
            raise ValueError(f"{len(opened)} adapter(s) and {len(weights or ())} weight(s)")
        file = model.root / companions.RECORD
        record = read_json(file) if model.root.is_dir() and file.is_file() else {}
        entries: Any = record.get("adapters")
        if record.get("operation") != "merge" or not _is_complete(record):
            return cls(model, {}, tuple(opened), tuple(weights or [1.0] * len(opened)), ())
        digests = [identity.checked_digest(one, str(given)) for one, given in zip(opened, adapters, strict=True)]
        free = list(range(len(entries)))
        places: list[tuple[int, int]] = []
        problems = []
        for i, value in enumerate(digests):
            found = next((k for k in free if entries[k]["digest"] == value), None)
            if found is None:
                problems.append(f"adapter {i + 1}: its digest is {value}")
                continue
            if weights is not None and weights[i] != entries[found]["weight"]:
                problems.append(
                    f"adapter {i + 1}: merged with weight {entries[found]['weight']:g}, given {weights[i]:g}"
                )
            free.remove(found)
            places.append((found, i))
        if problems:
            raise IncompatibleAdapter(
                f"{file}: the record of this model's merge does not list what is to be taken out",
                [*problems, *(f"recorded: {entry['digest']}, weight {entry['weight']:g}" for entry in entries)],
            )
        places.sort()
        return cls(
            model, record, tuple(opened[i] for _, i in places), tuple(float(entries[k]["weight"]) for k, _ in places),
            tuple(str(entries[k]["digest"]) for k in free),
        )  # fmt: skip

    def residual(self) -> Residual | None:
        """Open the residual, if the merge kept one."""
        path = self.model.root / companions.RESIDUAL
        return Residual.open(path) if self.record and path.is_file() else None

    def check_complete(self) -> None:
        """Raise `IncompatibleAdapter` unless all merged adapters were given: only all of them lead back to the base."""
        if self.left:
            raise IncompatibleAdapter(
                f"{self.model.path}: holds {len(self.left)} more adapter(s), without which the base cannot be restored",
                [f"not given: {value}" for value in self.left],
                hint="Give every adapter of the merge; then merge those that are to stay into the result.",
            )


def unmerge(
    model: str | Path,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Unmerge:
    """Write the model as it was before `adapters` were merged into it.

    With `base`, that is copied, and held against what the merge recorded of it (or the merge is verified, where nothing
    was recorded). With a residual beside the model every element is restored, W = P(W' − ΔW) plus the residual, and
    the result proved by the base's recorded hash. With neither, W̃ = W' − ΔW in float32, rounded once, is within
    2^-p·(|W'| + |W̃|) of W, p the bits of the dtype's mantissa.

    Raises `IncompatibleAdapter` for adapters that were not merged, or cannot be taken out that way, `WrongBase` where
    the result is not the recorded base, `BadFile` for a damaged residual, `OutputRefused`, `NoSpace`.
    """
    output = Path(output)
    atomic.check_output(output, force=force)
    merged = Merged.open(model, adapters, weights)
    _refuse_inputs(output, [merged.model.path, base])
    threads = threads or os.cpu_count() or 1
    residual = merged.residual() if base is None else None
    if base is not None or residual is not None:
        merged.check_complete()
    size = (Checkpoint.open(base) if base is not None else merged.model).nbytes
    if size > shutil.disk_usage(output.absolute().parent).free:
        raise NoSpace(
            f"{output}: the result takes about {size} bytes, more than the disk has free; nothing was written"
        )
    if base is not None:
        make = partial(_from_base, merged, Checkpoint.open(base), threads, progress)
    elif residual is not None:
        make = partial(_from_residual, merged, residual, threads, progress)
    else:
        make = partial(_approximate, merged, threads, progress)
    with atomic.new_folder(output, force=force) as scratch:
        return make(output, scratch)


def _from_base(
    merged: Merged, base: Checkpoint, threads: int, progress: Progress, output: Path, scratch: Path
) -> Unmerge:
    recorded: Any = merged.record["base"]["tensors"] if merged.record else {}
    restored, proved = len(recorded), "verify"
    if not merged.record:
        found = verify(merged.model, base, merged.adapters, weights=merged.weights, threads=threads)
        if not found.ok:
            raise WrongBase(
                f"{merged.model.path}: this is not {base.path} with these adapters, and no record tells of its merge",
                hint="`loratools verify` shows where they differ.",
            )
        restored = len(found.checked)
    for shard in base.shards:
        _copy(shard.path, scratch / shard.path.relative_to(base.root), progress)
    for path in base.indexes:
        _copy(path, scratch / path.relative_to(base.root), lambda _: None)
    for name, source in companions.companions(base, ()).items():
        _copy(source, scratch / name, lambda _: None)
    digests = hash_tensors(dict(Checkpoint.open(scratch).specs), digest.DEFAULT, threads)
    root = digest.root(digests)
    if merged.record:
        proved = "root hash" if prove(merged.record, digests, base.path) else "tensor digests"
    return Unmerge(str(output), "base", len(base.specs), restored, root, proved, 0.0)


def _from_residual(
    merged: Merged, residual: Residual, threads: int, progress: Progress, output: Path, scratch: Path
) -> Unmerge:
    tied = merged.record.get("tied") or "error"
    lost = lost_tensors(merged.model, residual, merged.adapters, merged.weights, tied)
    digests = restore(merged.model, residual, lost, scratch, threads, progress)
    proved = "root hash" if prove(merged.record, digests, merged.model.path) else "tensor digests"
    copy_companions(merged.model, residual, merged.record, scratch)
    return Unmerge(str(output), "residual", len(digests), len(lost), digest.root(digests), proved, 0.0)


def _approximate(merged: Merged, threads: int, progress: Progress, output: Path, scratch: Path) -> Unmerge:
    model = merged.model
    tied = merged.record.get("tied") or "both"
    plan = plan_merge(model, merged.adapters, [-weight for weight in merged.weights], tied=tied, check_base="off")
    touched = plan.touched()
    problems = [f"{name}: was replaced by the adapter's own" for name, change in touched.items() if change.replaced]
    problems += [
        f"{name}: {placement.update.kind} is not a sum"
        for name, change in touched.items()
        for _, placement in change.placements
        if not placement.update.additive
    ]
    if problems:
        raise IncompatibleAdapter(
            "W' − ΔW does not undo this merge",
            problems[:20],
            hint="Give the base model (--base), or merge with --keep-residual.",
        )
    digests = [identity.adapter_digest(adapter) for adapter in merged.adapters]
    results = write_weights(plan, scratch, Settings(digests, threads, retention="off"), progress)
    bound = max((_bound(plan, scratch, result.name) for result in results), default=0.0)
    record = identity.merge_record(model, merged.adapters, [-weight for weight in merged.weights], digests)
    record |= {"operation": "unmerge", "approximate": True, "error_bound": bound}
    companions.write_companions(plan, companions.companions(model, ()), record, scratch)
    notes = ("not the base model, but W' − ΔW: what rounding destroyed at the merge is lost",)
    return Unmerge(str(output), "approximate", len(plan.changes), len(touched), None, None, bound, notes)


def _bound(plan: MergePlan, folder: Path, name: str) -> float:
    """Return 2^-p·(max |W'| + max |W̃|) of a tensor: half a unit for each of the two roundings."""
    file, slot = next((file, slot) for file in plan.files for slot in file.slots if slot.name == name)
    after = TensorSpec(slot.dtype, slot.shape, folder / file.name, slot.offset, slot.offset + slot.nbytes)
    total = sum(_largest(spec) for spec in (plan.changes[name].source, after))
    return float(2.0 ** -dtypes.MANTISSA[slot.dtype] * total)


def _largest(spec: TensorSpec) -> float:
    import numpy as np

    largest = 0.0
    for chunk in files.chunks(spec):
        bits = np.frombuffer(chunk, candidates.unsigned(spec.dtype))
        largest = max(largest, float(np.abs(candidates.widen(bits, spec.dtype, np.float64)).max()))
    return largest


def _copy(source: Path, target: Path, progress: Progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with (
        files.descriptor(source) as opened,
        files.descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as made,
    ):
        for start in range(0, size, 1 << 26):
            stop = min(start + (1 << 26), size)
            files.copy_range(opened, start, stop, made, start, source)
            progress(stop - start)


def _refuse_inputs(output: Path, inputs: Sequence[str | Path | None]) -> None:
    target = output.resolve()
    for path in inputs:
        source = Path(path).resolve() if path is not None else None
        if source and (target == source or source in target.parents or target in source.parents):
            raise OutputRefused(f"{output} is, holds or lies in the input {path}", hint="Choose another output.")


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Tell whether a record has what is needed to undo its merge: a file that people may edit."""
    adapters, base = record.get("adapters"), record.get("base")
    return (
        isinstance(adapters, list)
        and all(
            isinstance(entry, Mapping)
            and isinstance(entry.get("digest"), str)
            and isinstance(entry.get("weight"), int | float)
            for entry in adapters
        )
        and isinstance(base, Mapping)
        and isinstance(base.get("tensors"), Mapping)
    )
