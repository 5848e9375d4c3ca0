"""Write a base model anew from a merged one, its residual and the adapters, and prove it by the recorded hash."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.engine.residual import LENGTH, Layout, Lost, Residual, codes, prediction, read_bits
from loratools.engine.residual.predict import Step, steps
from loratools.errors import BadFile
from loratools.parallel import Progress, each
from loratools.storage import digest, dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan, Slot, index_json, plan_file


def lost_tensors(
    model: Checkpoint, residual: Residual, adapters: Sequence[Adapter], weights: Sequence[float], tied: str
) -> dict[str, Lost]:
    """Return what the residual brings back, with the placements that the merge had: found again from the base's layout.

    Raises `IncompatibleAdapter` where the adapters do not fit the base that the residual describes, `BadFile` where the
    merged model lacks what the residual builds on.
    """
    described = {name: (dtype, shape) for file in residual.layout for name, dtype, shape in file.tensors}
    shapes = {name: spec.shape for name, spec in model.specs.items()}
    shapes |= {name: shape for name, (_, shape) in described.items()}
    config = {key: value for key, value in {**model.config, **residual.config}.items() if value is not None}
    specs = {name: TensorSpec(dtype, shape, model.path, 0, 0) for name, (dtype, shape) in described.items()}
    untied = apply_policy(tuple(adapters), specs, config, tied)
    placements: dict[str, list[tuple[Placement, float]]] = {}
    for adapter, weight in zip(untied.adapters, weights, strict=True):
        for placement in resolve(adapter, shapes, config):
            placements.setdefault(placement.site.tensor, []).append((placement, weight))
    lost = {}
    for name, mode in residual.modes.items():
        dtype, shape = described[name]
        after = model.specs.get(name)
        if mode == "stored":
            lost[name] = Lost(name, dtype, shape, None)
        elif (
            mode not in ("predicted", "direct")
            or after is None
            or after.shape != shape
            or after.dtype not in dtypes.FLOATS
        ):
            raise BadFile(f"{residual.path}: tensor {name!r} cannot be predicted from this model ({mode})")
        else:
            lost[name] = Lost(name, dtype, shape, after, tuple(placements.get(name, ())) if mode == "predicted" else ())
    return lost


def restore(
    model: Checkpoint, residual: Residual, lost: Mapping[str, Lost], folder: Path, threads: int, progress: Progress
) -> dict[str, str]:
    """Write the base's files of tensors and their indexes into `folder`; return the digest of every tensor.

    Tensors are written as they become ready, each by one thread; memory is that of a few tiles and of the residuals of
    the tensors under work.
    """
    plans = [file_plan(model, file) for file in residual.layout]
    missing = [
        slot.name
        for plan in plans
        for slot in plan.slots
        if slot.name not in lost and not _same(model.specs.get(slot.name), slot)
    ]
    if missing:
        raise BadFile(f"{residual.path}: the merged model lacks tensors that it should hold unchanged", missing[:20])
    for plan in plans:
        path = folder / plan.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as target:
            os.truncate(target, plan.size)
            files.write_from(target, memoryview(plan.header), 0)

    def write(name: str, place: tuple[Slot, Path]) -> str:
        slot, path = place
        hasher = digest.start_tensor(slot.dtype, slot.shape)
        at = slot.offset
        with files.descriptor(path, os.O_WRONLY) as target:
            for piece in _pieces(model, residual, lost, name):
                hasher.update(piece)
                files.write_from(target, memoryview(piece), at)
                at += len(piece)
                progress(len(piece))
        if at != slot.offset + slot.nbytes:
            raise BadFile(f"{residual.path}: tensor {name!r} has {at - slot.offset} bytes, expected {slot.nbytes}")
        return digest.finish(hasher)

    slots = [(slot, folder / plan.name) for plan in plans for slot in plan.slots]
    slots.sort(key=lambda item: -item[0].nbytes)
    digests = each(write, {slot.name: (slot, path) for slot, path in slots}, threads)
    _write_indexes(plans, residual, folder)
    return digests


def _pieces(model: Checkpoint, residual: Residual, lost: Mapping[str, Lost], name: str) -> Iterator[Any]:
    return Restorer(lost[name], residual).pieces() if name in lost else files.chunks(model.specs[name])


def _same(spec: TensorSpec | None, slot: Slot) -> bool:
    return spec is not None and (spec.dtype, spec.shape) == (slot.dtype, slot.shape)


def file_plan(model: Checkpoint, file: Layout) -> FilePlan:
    """Lay out one of the base's files; where the merged model has the same header, its bytes are taken over."""
    for shard in model.shards:
        listed = [(name, spec.dtype, spec.shape) for name, spec in shard.tensors.items()]
        if str(shard.path.relative_to(model.root)) == file.name and listed == list(file.tensors):
            begin = min((spec.start for spec in shard.tensors.values()), default=0)
            with shard.path.open("rb") as opened:
                return plan_file(file.name, file.tensors, header=opened.read(begin))
    return plan_file(file.name, file.tensors, file.metadata, prefix=file.prefix)


def _write_indexes(plans: Sequence[FilePlan], residual: Residual, folder: Path) -> None:
    prefixes = {file.name: file.prefix for file in residual.layout}
    for name, metadata in residual.indexes.items():
        part = [plan for plan in plans if Path(plan.name).parent == Path(name).parent]
        weight_map = {
            slot.name.removeprefix(prefixes[plan.name]): Path(plan.name).name for plan in part for slot in plan.slots
        }
        index = {**index_json(part, metadata), "weight_map": dict(sorted(weight_map.items()))}
        (folder / name).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Restorer:
    """Reads a tensor of the base out of its merged one and the residual; made for one thread."""

    def __init__(self, lost: Lost, residual: Residual) -> None:
        import numpy as np

        self._lost, self._residual = lost, residual
        self._blob = memoryview(files.read_bytes(residual.tensors[lost.name]))
        self._steps: list[Step] = []
        self._blocks: list[memoryview] = []
        self._held: tuple[int, Any] = (-1, None)
        if lost.after is None:
            return
        self._steps = steps(lost.placements)
        at = 0
        for step in self._steps:
            if step.gains is not None:
                size = 4 * step.features
                step.gains = np.frombuffer(self._piece(at, size), "<f4").astype(np.float32)
                at += size
        for _ in lost.tiles():
            (size,) = LENGTH.unpack(self._piece(at, LENGTH.size))
            self._blocks.append(self._piece(at + LENGTH.size, size))
            at += LENGTH.size + size
        if at != len(self._blob):
            raise self._fault("it goes on after its last block")

    def pieces(self) -> Iterator[bytes]:
        """Yield the base's bytes, one tile after the other; raise `BadFile` where they cannot be brought back."""
        if self._lost.after is None:
            size = dtypes.bits(self._lost.dtype) * self._count() // 8
            inflater = zlib.decompressobj()
            try:
                raw = inflater.decompress(self._blob, size + 1)
            except zlib.error:
                raise self._fault("it is damaged") from None
            if len(raw) != size:
                raise self._fault(f"it holds {len(raw)} bytes, the tensor {size}")
            yield raw
            return
        import torch

        torch.set_num_threads(1)  # for this thread, as in `_encode`
        columns = self._lost.matrix[1]
        with files.descriptor(self._lost.after.file) as source:
            for (start, stop), block in zip(self._lost.tiles(), self._blocks, strict=True):
                after = read_bits(source, self._lost.after, start * columns, stop * columns)
                predicted = prediction(self._lost, after, self._steps, start)
                try:
                    bits = codes.decode(block, after, predicted, self._lost.dtype, self._lost.after.dtype)
                except BadFile as error:
                    raise self._fault(error.message) from None
                yield bits.tobytes()

    def _count(self) -> int:
        rows, columns = self._lost.matrix
        return rows * columns

    def _piece(self, at: int, size: int) -> memoryview:
        if at + size > len(self._blob):
            raise self._fault("it is truncated")
        return self._blob[at : at + size]

    def _fault(self, what: str) -> BadFile:
        return BadFile(f"{self._residual.path}: tensor {self._lost.name!r}: {what}")
