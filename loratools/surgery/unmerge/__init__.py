"""Take adapters out of a merged model again: exactly from the base or the residual, else within a stated bound.

merged     a merged model, its record, and the adapters that are to be taken out
subtract   W̃ = W' − ΔW, with the checks and the record of a merge
bound      how far that can be from the base
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loratools.decisions import decided, warned
from loratools.engine.residual import Residual
from loratools.engine.residual.restore import restore
from loratools.engine.run import Settings, write_weights
from loratools.errors import WrongBase
from loratools.options import Options, Tied
from loratools.parallel import Progress, cores, no_progress
from loratools.storage import atomic, digest, files
from loratools.storage.beside.cards import read_card
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs.state import BESIDE
from loratools.storage.codecs.state import beside as beside_config
from loratools.storage.companions import companions, copy_companions, json_text
from loratools.storage.sources import Location, session
from loratools.storage.strict_json import read_json
from loratools.surgery.base import prove
from loratools.surgery.hash import hash_tensors
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Weights,
    as_asked,
    check_weights,
    places,
    places_of,
    planned,
    typed_model,
)
from loratools.surgery.merge.folder import without_section
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.merge.prepare import Account
from loratools.surgery.merge.single import is_single, left_behind, new_model
from loratools.surgery.unmerge.merged import MergedModel

Method = Literal["base", "residual", "approximate"]
Proof = Literal["root hash", "tensor digests", "verify"]


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What became of a model, and by which `method`.

    `proved` says what shows that the result is the base; None where nothing does. `restored` counts the tensors that
    the merge had changed. `root` is the root hash of an exact result. `error_bound` limits |W̃ − W| of every element of
    an approximate result, W being the base with the adapters that stay; it is 0 for an exact one. `left_behind` are
    files of the model's folder (the base's, where that is copied) that the output has not. `consumed` says what became
    of the tensors of the adapters that were subtracted.
    """

    output: str
    method: Method
    tensors: int
    restored: int
    root: str | None
    proved: Proof | None
    error_bound: float
    notes: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    consumed: tuple[Account, ...] = ()


_APPROXIMATE = "not the base model, but W' − ΔW: what rounding destroyed at the merge is lost"


@session()
def unmerge(
    model: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    base: ModelSource | None = None,
    weights: Weights = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    model_type: str | None = None,
    tied: Tied | None = None,
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
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
        output: The folder to write, or one file (`out.safetensors`), as for `merge`; it must not exist, unless `force`.
        base: The base model, where it is at hand. Default: the result comes from the merged model.
        weights: The weights of the merge, for a model without a record of it; beside a record they must be those
            recorded. Default: those recorded, or 1 for each.
        include: Patterns of the modules that count: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`.
            Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha that the adapters were trained with, for files that do not record it; it wins over one that
            they record. Default: the file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        tied: What the merge did to a head that is the same tensor as the embedding, for a model without a record of it.
            Default: what the record says, or `"both"`.
        threads: Threads to work with; no byte depends on it. Default: one per core.
        force: Whether to replace an output that exists. Default: no.
        durable: Whether the output is on the disk itself before it has its name, so that a power cut leaves it whole or
            absent; it takes as long as the disk needs to write it. Default: no, the system writes it when it likes.
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
    atomic.sweep(output)
    Options().threads(threads).flag("force", force).flag("durable", durable).done()
    if tied is not None:
        Options().word("tied", tied, Tied).done()
    adapters, weights = as_asked(adapters, weights, include, exclude, dialect, alpha, model_type)
    check_weights(adapters, weights)
    output, threads, progress = Path(output), threads or cores(), progress or no_progress
    atomic.check_output(output, force=force)
    merged = MergedModel.open(typed_model(model, model_type), adapters, weights)
    original = None if base is None else typed_model(base, model_type)
    of_base = places_of(original) if original else []
    atomic.refuse_inputs(output, [*places_of(merged.model), *of_base, *places(merged.inputs)])
    residual = None if original else merged.residual()
    if original is None:
        merged.check_layers()
    if original is not None or residual is not None:
        merged.check_complete()
    way = "the base" if original else "the residual" if residual else "W' − ΔW, as there is no residual and no base"
    decided("%s: restored from %s; %s", merged.model.path, way,
            "its record tells of the merge" if merged.record else "no record tells of its merge")  # fmt: skip
    total = (original or merged.model).nbytes
    planned(
        "unmerge", output, [merged.model.path, *merged.inputs], nbytes=total, tensors=len(merged.model.specs),
        adapters=[each.digest for each in merged.inputs], recorded=bool(merged.record), **{"from": way},
    )  # fmt: skip
    atomic.check_space(output, (original or merged.model).nbytes)
    single = is_single(output, original or merged.model)
    with new_model(output, single=single, force=force, durable=durable) as scratch:
        if original is not None:
            restored, digests, left = _copy_base(
                merged, original, threads, progress, scratch, output if single else None
            )
        elif residual is not None:
            residual = residual.as_one(output.name) if single else residual
            lost = merged.lost(residual)
            restored, digests = len(lost), restore(merged.model, residual, lost, scratch, threads, progress)
            beside = left_behind(merged.model, ()) if single else companions(merged.model, ())
            left = beside.left
            merged.tell_brought()
            if not single:
                copy_companions(beside, scratch, _unmerged_texts(beside.sources, residual, merged.record))
        else:
            options = MergeOptions(
                tied=merged.tied or tied or "both", check_base="off", retention="off", threads=threads
            )
            from loratools.surgery.unmerge.subtract import subtract

            done = subtract(merged, (), options, output, progress, scratch)
            warned(_APPROXIMATE)
            plan = done.prepared.plan
            return UnmergeReport(
                atomic.spelled(output), "approximate", len(plan.changes), len(plan.touched()), None, None, done.bound,
                (_APPROXIMATE, *done.notes), done.prepared.beside.left, done.prepared.accounts,
            )  # fmt: skip
        proved: Proof = "verify"
        if merged.record:
            whole = prove(merged.record, digests, (original or merged.model).path)
            proved = "root hash" if whole else "tensor digests"
        method: Method = "base" if original else "residual"
        root = digest.root(digests)
        return UnmergeReport(atomic.spelled(output), method, len(digests), restored, root, proved, 0.0, (), left)


def _copy_base(
    merged: MergedModel, base: Checkpoint, threads: int, progress: Progress, scratch: Path, single: Path | None
) -> tuple[int, dict[str, str], tuple[str, ...]]:
    """Copy a base that is, by the record or else by a proof, the one of the merge; into one file where one is given.

    Returns the number of tensors that the merge had changed, the digests of all that was written, and the files of the
    base's folder that stay behind.
    """
    if merged.record:
        changed = len(merged.record["base"]["tensors"])
    else:
        from loratools.surgery.verify import verify  # a record says what a proof would

        adapters = [each.path if each.words and each.path else each.adapter for each in merged.inputs]
        weights = [each.words if each.words and each.path else each.weight for each in merged.inputs]
        verification = verify(merged.model, base, adapters, weights=weights, threads=threads)
        if not verification.tensors_ok:
            raise WrongBase(
                f"{merged.model.path}: this is not {base.path} with these adapters, and no record tells of its merge",
                hint="`loratools verify` shows where they differ.",
            )
        changed = len(verification.checked)
    if single and not base.path.is_file():
        options = MergeOptions(check_base="off", retention="off", threads=threads)
        plan = plan_merge(base, (), options, single=single.name)
        write_weights(plan, scratch, Settings(threads, retention="off"), progress)
        left = left_behind(base, ()).left
        return changed, hash_tensors(dict(Checkpoint.open(scratch / single.name).specs), digest.DEFAULT, threads), left
    for path in [*(shard.path for shard in base.shards), *base.indexes]:
        target = scratch / (single.name if single else path.relative_to(base.root))
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        with files.descriptor(path) as source, files.descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as copy:
            for start in range(0, size, 1 << 26):
                stop = min(start + (1 << 26), size)
                files.copy_range(source, start, stop, copy, start, path)
                progress(stop - start)
    beside = companions(base, ())
    copy_companions(beside, scratch, {})
    written = scratch / single.name if single else scratch
    return changed, hash_tensors(dict(Checkpoint.open(written).specs), digest.DEFAULT, threads), beside.left


def _unmerged_texts(
    sources: Mapping[str, Path], residual: Residual, record: Mapping[str, Any]
) -> dict[str, str | None]:
    """Return the texts of the files that the merge changed, as they were before: config.json and the model card."""
    texts: dict[str, str | None] = {}
    if "config.json" in sources and residual.config:
        config = read_json(sources["config.json"])
        config |= residual.config
        absent = [key for key, value in residual.config.items() if value is None]
        texts["config.json"] = json_text({key: value for key, value in config.items() if key not in absent})
    if BESIDE in sources and residual.config:
        document = beside_config(read_json(sources[BESIDE]), residual.config, ())
        texts[BESIDE] = None if document is None else json_text(document)
    if "README.md" in sources:
        text = read_card(sources["README.md"])
        texts["README.md"] = without_section(text, record) or None
    return texts
