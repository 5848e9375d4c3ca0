"""Take adapters out of a merged model again: exactly from the base or the residual, else within a stated bound.

merged     a merged model, its record, and the adapters that are to be taken out
subtract   W̃ = W' − ΔW, and the bound of its error
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loratools.engine.residual import Residual
from loratools.engine.residual.restore import restore
from loratools.errors import NoSpace, WrongBase
from loratools.options import Options
from loratools.parallel import Progress, cores, no_progress
from loratools.storage import atomic, digest, files
from loratools.storage.atomic import refuse_inputs
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import companions, copy_companions, json_text
from loratools.storage.strict_json import read_json
from loratools.surgery.base import prove
from loratools.surgery.hash import hash_tensors
from loratools.surgery.inputs import AdapterSource, ModelSource, open_model, places
from loratools.surgery.merge.card import without_section
from loratools.surgery.merge.options import MergeOptions, Tied
from loratools.surgery.unmerge.merged import MergedModel
from loratools.surgery.unmerge.subtract import subtract
from loratools.surgery.verify import verify

Method = Literal["base", "residual", "approximate"]
Proof = Literal["root hash", "tensor digests", "verify"]


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What became of a model, and by which `method`.

    `proved` says what shows that the result is the base; None where nothing does. `restored` counts the tensors that
    the merge had changed. `root` is the root hash of an exact result. `error_bound` limits |W̃ − W| of every element of
    an approximate result; it is 0 for an exact one.
    """

    output: str
    method: Method
    tensors: int
    restored: int
    root: str | None
    proved: Proof | None
    error_bound: float
    notes: tuple[str, ...] = ()


def unmerge(
    model: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    output: str | Path,
    *,
    base: ModelSource | None = None,
    weights: float | Sequence[float] | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write a merged model as it was before the adapters were merged into it.

    With `base`, that is copied and compared with what the merge recorded of it; a model without a record is verified.
    With a residual beside the model every element is restored, W = P(W' − ΔW) plus the residual, and the recorded hash
    of the base proves the result. With neither, W̃ = W' − ΔW in float32, rounded once, is within 2^-p·(|W'| + |W̃|) of
    W, p the bits of the dtype's mantissa, plus the error of the float32 sums.

    Args:
        model: The merged model: a path, an `hf://` reference, or an open `Checkpoint`.
        adapters: The adapters to take out, one or several. The base and the residual need every adapter of the merge.
        output: The folder to write; it must not exist, unless `force`.
        base: The base model, where it is at hand. Default: the result comes from the merged model.
        weights: The weights of the merge, for a model without a record of it; beside a record they must be those
            recorded. Default: those recorded, or 1 for each.
        threads: Threads to work with; no byte depends on it. Default: one per core.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes written since the last call, from any thread. Default: nobody is told.

    Returns:
        By which method the model was written, what proves it, and how far it can be from the base.

    Raises:
        InvalidOption: A number, or the count of weights, is wrong.
        IncompatibleAdapter: An adapter was not merged, one is missing, or the merge did more than to add and kept no
            residual.
        WrongBase: The result is not the recorded base.
        BadFile: The residual, or another input, is damaged.
        OutputRefused, NoSpace: The output exists or is an input; the disk is too small.

    Example:
        >>> unmerge("merged", "adapter", "unmerged", base="base").proved
        'tensor digests'
    """
    options = Options()
    options.number("threads", threads, least=1, optional=True)
    options.flag("force", force)
    options.done()
    output, threads, progress = Path(output), threads or cores(), progress or no_progress
    atomic.check_output(output, force=force)
    merged = MergedModel.open(model, adapters, weights)
    original = None if base is None else open_model(base)
    refuse_inputs(output, [merged.model.path, *([original.path] if original else []), *places(merged.inputs)])
    residual = None if original else merged.residual()
    if original is None:
        merged.check_layers()
    if original is not None or residual is not None:
        merged.check_complete()
    size = (original or merged.model).nbytes
    if size > shutil.disk_usage(output.absolute().parent).free:
        raise NoSpace(
            f"{output}: the result takes about {size} bytes, more than the disk has free; nothing was written"
        )
    if original is not None:
        write = partial(_copy_base, merged, original)
    elif residual is not None:
        write = partial(_restore, merged, residual)
    else:
        write = partial(_subtract, merged)
    with atomic.new_folder(output, force=force) as scratch:
        return write(threads, progress, output, scratch)


def _copy_base(
    merged: MergedModel, base: Checkpoint, threads: int, progress: Progress, output: Path, scratch: Path
) -> UnmergeReport:
    proved: Proof = "verify"
    if merged.record:
        restored = len(merged.record["base"]["tensors"])
    else:
        adapters, weights = [each.adapter for each in merged.inputs], [each.weight for each in merged.inputs]
        verification = verify(merged.model, base, adapters, weights=weights, threads=threads)
        if not verification.ok:
            raise WrongBase(
                f"{merged.model.path}: this is not {base.path} with these adapters, and no record tells of its merge",
                hint="`loratools verify` shows where they differ.",
            )
        restored = len(verification.checked)
    for shard in base.shards:
        _copy(shard.path, scratch / shard.path.relative_to(base.root), progress)
    for path in base.indexes:
        _copy(path, scratch / path.relative_to(base.root), no_progress)
    copy_companions(companions(base, ()), scratch, {})
    digests = hash_tensors(dict(Checkpoint.open(scratch).specs), digest.DEFAULT, threads)
    if merged.record:
        proved = "root hash" if prove(merged.record, digests, base.path) else "tensor digests"
    return UnmergeReport(str(output), "base", len(base.specs), restored, digest.root(digests), proved, 0.0)


def _restore(
    merged: MergedModel, residual: Residual, threads: int, progress: Progress, output: Path, scratch: Path
) -> UnmergeReport:
    lost = merged.lost(residual)
    digests = restore(merged.model, residual, lost, scratch, threads, progress)
    proved: Proof = "root hash" if prove(merged.record, digests, merged.model.path) else "tensor digests"
    sources = companions(merged.model, ())
    copy_companions(sources, scratch, _unmerged_texts(sources, residual, merged.record))
    return UnmergeReport(str(output), "residual", len(digests), len(lost), digest.root(digests), proved, 0.0)


def _subtract(merged: MergedModel, threads: int, progress: Progress, output: Path, scratch: Path) -> UnmergeReport:
    tied: Tied = merged.record.get("tied") or "both"
    options = MergeOptions(tied=tied, check_base="off")
    made = subtract(merged, (), "unmerge", options, threads, progress, scratch)
    notes = ("not the base model, but W' − ΔW: what rounding destroyed at the merge is lost",)
    return UnmergeReport(
        str(output), "approximate", len(made.plan.changes), len(made.plan.touched()), None, None, made.error_bound,
        notes,
    )  # fmt: skip


def _copy(source: Path, target: Path, progress: Progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with (
        files.descriptor(source) as original,
        files.descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as copy,
    ):
        for start in range(0, size, 1 << 26):
            stop = min(start + (1 << 26), size)
            files.copy_range(original, start, stop, copy, start, source)
            progress(stop - start)


def _unmerged_texts(
    sources: Mapping[str, Path], residual: Residual, record: Mapping[str, Any]
) -> dict[str, str | None]:
    """Return the texts of the files that the merge changed, as they were before: config.json and the model card."""
    texts: dict[str, str | None] = {}
    if "config.json" in sources and residual.config:
        config = {**read_json(sources["config.json"]), **residual.config}
        texts["config.json"] = json_text(
            {key: value for key, value in config.items() if value is not None or key not in residual.config}
        )
    if "README.md" in sources:
        text = sources["README.md"].read_text(encoding="utf-8", errors="replace")
        texts["README.md"] = without_section(text, record) or None
    return texts
