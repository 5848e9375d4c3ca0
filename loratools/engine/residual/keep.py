"""Keep the residual of a merge: look at every touched tensor once more, and write what its rounding destroyed."""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loratools.engine.residual import (
    ELEMENTS,
    HEADED,
    VERSION,
    Array,
    Layout,
    Lost,
    Residual,
    description,
    read_bits,
)
from loratools.engine.residual import predict as undo
from loratools.engine.residual.tiles import Coder
from loratools.parallel import Progress, no_progress, workers
from loratools.parallel.memory import lent
from loratools.storage import dtypes, files
from loratools.storage.beside.along import residual_of
from loratools.storage.codecs.floats import widen
from loratools.storage.companions import RESIDUAL
from loratools.storage.header import TensorSpec
from loratools.storage.layout import plan_file

if TYPE_CHECKING:
    from loratools.engine.plan import MergePlan
    from loratools.engine.task import Restore
    from loratools.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Kept:
    """What a residual takes: bytes of its file, and those of the base's tensors that it can bring back."""

    nbytes: int
    touched: int

    @property
    def share(self) -> float:
        """Return bytes of the residual over bytes of the tensors that the merge touched."""
        return self.nbytes / self.touched if self.touched else 0.0


@dataclass(frozen=True, slots=True)
class Early:
    """What was coded while the merge ran: for each tensor a place in `spool`, from and how many bytes."""

    spool: BinaryIO
    pieces: dict[str, tuple[int, int]] = field(default_factory=dict)


def keep(
    plan: MergePlan, folder: Path, threads: int, progress: Progress = no_progress, *,
    before: Mapping[str, Restore] | None = None, below: Residual | None = None, early: Early | None = None,
) -> Kept:  # fmt: skip
    """Write the residual of a merge whose tensors are in `folder`, from the base and the result; return its size.

    Needs a second look at every touched tensor, which the page cache still has, but for those that are in `early`.
    `before` restores, once more, tensors of the base that were overwritten where they lay (`engine/run.py`); each
    passes through a temporary file. `below` is the residual that they come from, which describes the files of the base.
    """
    before, name = before or {}, residual_name(plan)
    stored = plan.base.stored or plan.base
    lost, pieces = list(lost_by(plan, stored, folder)), dict(early.pieces if early else {})
    with workers(threads) as pool, (folder / f".{name}.spool").open("w+b") as spool:
        places, end, waiting = {tensor: early.spool.fileno() for tensor in pieces} if early else {}, 0, deque[Any]()
        left = iter([tensor for tensor in lost if tensor.name not in pieces])

        def submit(tensor: Lost) -> Any:
            base, restore = stored.specs[tensor.name], before.get(tensor.name)
            return tensor.name, pool.submit(_encode, tensor, base, progress, folder, restore)

        waiting.extend(map(submit, islice(left, threads + 1)))
        while waiting:
            tensor, future = waiting.popleft()
            blob = future.result()
            waiting.extend(map(submit, islice(left, 1)))
            pieces[tensor], places[tensor] = (end, len(blob)), spool.fileno()
            end += spool.write(blob)
        spool.flush()
        document = {
            "version": VERSION,
            "modes": {tensor.name: tensor.mode for tensor in lost},
            "config": {key: stored.config.get(key) for key in (*plan.config, *plan.dropped)},
            **(_described(plan, stored) if below is None else description(below.layout, below.indexes)),
        }
        metadata = {"residual": json.dumps(document, separators=(",", ":"), ensure_ascii=False)}
        file = plan_file(name, [(each.name, "U8", (pieces[each.name][1],)) for each in lost], metadata)
        with files.descriptor(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as target:
            files.write_from(target, memoryview(file.header), 0)
            at = len(file.header)
            for tensor in lost:
                start, size = pieces[tensor.name]
                files.copy_range(places[tensor.name], start, start + size, target, at)
                at += size
    (folder / f".{name}.spool").unlink()
    return Kept(file.size, sum(stored.specs[tensor.name].nbytes for tensor in lost))


def residual_name(plan: MergePlan) -> str:
    """Return the name of the residual beside the output of a plan."""
    return residual_of(Path(plan.files[0].name)) if plan.single else RESIDUAL


def _described(plan: MergePlan, stored: Checkpoint) -> dict[str, Any]:
    """Return what a residual says of the files of a base; headers stand in it that nothing else would bring back."""
    written = {file.name: file.header for file in plan.files}
    layout = []
    for shard in stored.shards:
        path = shard.path.relative_to(stored.root)
        has_header = path.suffix in HEADED
        name = (path if has_header else path.with_suffix(".safetensors")).as_posix()
        header = shard.header() if has_header else None
        known = (written.get(name), plan_file(name, shard.layout, shard.metadata, prefix=shard.prefix).header)
        header = None if header in known else header
        layout.append(Layout(name, shard.layout, shard.metadata, shard.prefix, header))
    indexes = {
        path.relative_to(stored.root).as_posix().replace(".bin.index", ".safetensors.index"): {
            key: value for key, value in (index.get("metadata") or {}).items() if key != "total_size"
        }
        for path, index in stored.indexes.items()
    }
    return description(layout, indexes)


def lost_by(plan: MergePlan, stored: Checkpoint, folder: Path) -> Iterator[Lost]:
    """Find the base's tensors that the output does not hold byte for byte, and what became of them.

    Codes, and what gives them their meaning, are kept as they are: they take a quarter of what they stand for.
    """
    written = {name: spec for file in plan.files for name, spec in file.specs(folder).items()}
    for name, spec in stored.specs.items():
        change, after = plan.changes.get(name), written.get(name)
        if change is None or after is None or change.part_of or change.source.encoding:
            yield Lost(name, spec.dtype, spec.shape, None)
            continue
        if not change.placements and not change.replaced and after.dtype == spec.dtype:
            continue
        predictable = not change.replaced and undo.is_predictable([p for _, p in change.placements])
        placements = tuple((p, plan.weights[i]) for i, p in change.placements) if predictable else ()
        comparable = after.shape == spec.shape and {after.dtype, spec.dtype} <= set(dtypes.FLOATS)
        yield Lost(name, spec.dtype, spec.shape, after if comparable else None, placements)


def _encode(lost: Lost, base: TensorSpec, progress: Progress, folder: Path, restore: Restore | None = None) -> bytes:
    if restore is not None:
        with files.temporary(folder, ".restored-") as (target, path):
            restore(target, 0)
            return _encode(lost, base._replace(file=path, start=0, stop=base.nbytes), progress, folder)
    if lost.after is None:
        progress(base.nbytes)
        packer = zlib.compressobj(6)
        return b"".join([*(packer.compress(chunk) for chunk in files.chunks(base)), packer.flush()])
    columns = lost.matrix[1]
    with (
        files.descriptor(base.file) as source, files.descriptor(lost.after.file) as result,
        lent() as room, lent() as other,
    ):  # fmt: skip

        def rows(start: int, stop: int) -> Array:
            bits = read_bits(source, base, start * columns, stop * columns, room)
            return widen(bits, base.dtype, np.float64).reshape(-1, columns)

        steps = undo.steps(lost.placements)
        undo.measure(lost.placements, steps, rows, max(1, ELEMENTS // max(1, columns)))
        parts = [step.gains.astype("<f4").tobytes() for step in steps if step.gains is not None]
        coder = Coder(lost, steps)
        for start, stop in lost.tiles():
            W = read_bits(source, base, start * columns, stop * columns, room)
            after = read_bits(result, lost.after, start * columns, stop * columns, other)
            parts.append(coder.blocks(W, after, start, stop, stop - start))
            progress(W.nbytes)
    return b"".join(parts)
