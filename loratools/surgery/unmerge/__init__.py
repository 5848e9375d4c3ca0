"""Take adapters out of a merged model again: exactly from the base or the residual, else within a stated bound.

merged   a merged model, its record, and the adapters that it names
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter
from loratools.engine.residual import Residual
from loratools.engine.residual.restore import lost_tensors, restore
from loratools.engine.run import Settings, write_weights
from loratools.errors import NoSpace, WrongBase
from loratools.parallel import Progress, cores
from loratools.storage import atomic, digest, files
from loratools.storage.atomic import refuse_inputs
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import companions
from loratools.storage.strict_json import read_json
from loratools.surgery.base import prove
from loratools.surgery.hash import hash_tensors
from loratools.surgery.merge.card import without_section
from loratools.surgery.merge.folder import write_companions
from loratools.surgery.merge.options import MergeOptions, Tied
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.record import merge_record
from loratools.surgery.unmerge.merged import Merged, check_sums, error_bound
from loratools.surgery.verify import verify


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
    2^-p·(|W'| + |W̃|) of W, p the bits of the dtype's mantissa, and what the float32 sums cost.

    Raises `IncompatibleAdapter` for adapters that were not merged, or cannot be taken out that way, `WrongBase` where
    the result is not the recorded base, `BadFile` for a damaged residual, `OutputRefused`, `NoSpace`.
    """
    output = Path(output)
    atomic.check_output(output, force=force)
    merged = Merged.open(model, adapters, weights)
    refuse_inputs(output, [merged.model.path, base])
    threads = threads or cores()
    residual = merged.residual() if base is None else None
    if base is None:
        merged.check_layers()
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
    for name, source in companions(base, ()).items():
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
    tied: Tied = merged.record.get("tied") or "both"
    options = MergeOptions(tied=tied, check_base="off")
    plan = plan_merge(model, merged.adapters, [-weight for weight in merged.weights], options)
    check_sums(plan)
    results = write_weights(plan, scratch, Settings(merged.digests, threads, retention="off"), progress)
    bound = max((error_bound(plan, scratch, result.name) for result in results), default=0.0)
    record = merge_record(model, merged.adapters, [-weight for weight in merged.weights], merged.digests)
    record |= {"operation": "unmerge", "approximate": True, "error_bound": bound}
    write_companions(plan, companions(model, ()), record, scratch)
    notes = ("not the base model, but W' − ΔW: what rounding destroyed at the merge is lost",)
    return Unmerge(str(output), "approximate", len(plan.changes), len(plan.touched()), None, None, bound, notes)


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


def copy_companions(model: Checkpoint, residual: Residual, record: Mapping[str, Any], folder: Path) -> None:
    """Copy the other files of the merged model, without what the merge wrote into them."""
    for name, source in companions(model, ()).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json" and residual.config:
            config = {**read_json(source), **residual.config}
            config = {key: value for key, value in config.items() if value is not None or key not in residual.config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name == "README.md":
            if text := without_section(source.read_text(encoding="utf-8", errors="replace"), record):
                target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, target)
