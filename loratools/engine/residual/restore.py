"""Write a base model anew from a merged one, its residual and the adapters, and prove it by the recorded hash."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.engine.residual import LENGTH, Layout, Lost, Residual, codes, prediction, read_bits
from loratools.engine.residual.predict import Step, steps
from loratools.errors import BadFile
from loratools.parallel import Progress, each, no_progress
from loratools.storage import digest, dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import json_text
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan, index_json, plan_file


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
    specs = {name: spec for plan in plans for name, spec in plan.specs(folder).items()}
    kept = {name: (spec.dtype, spec.shape) for name, spec in model.specs.items() if name not in lost}
    missing = [name for name, spec in specs.items() if name not in lost and kept.get(name) != (spec.dtype, spec.shape)]
    if missing:
        raise BadFile(f"{residual.path}: the merged model lacks tensors that it should hold unchanged", missing[:20])
    for plan in plans:
        path = folder / plan.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as target:
            os.truncate(target, plan.size)
            files.write_from(target, memoryview(plan.header), 0)

    def write(name: str, spec: TensorSpec) -> str:
        pieces = Restorer(lost[name], residual).pieces() if name in lost else files.chunks(model.specs[name])
        with files.descriptor(spec.file, os.O_WRONLY) as target:
            return write_pieces(pieces, name, spec, target, residual.path, progress)

    digests = each(write, dict(sorted(specs.items(), key=lambda item: -item[1].nbytes)), threads)
    for name, metadata in residual.indexes.items():
        part = Path(name).parent
        prefix = next((file.prefix for file in residual.layout if Path(file.name).parent == part), "")
        (folder / name).write_text(json_text(index_json(plans, metadata, part, prefix)), encoding="utf-8")
    return digests


def write_pieces(
    pieces: Iterable[bytes | memoryview], name: str, spec: TensorSpec, target: int, residual: Path,
    progress: Progress = no_progress,
) -> str:  # fmt: skip
    """Write the bytes of a restored tensor where `spec` says, to an open file; return its digest."""
    hasher, at = digest.start_tensor(spec.dtype, spec.shape), spec.start
    for piece in pieces:
        hasher.update(piece)
        files.write_from(target, memoryview(piece), at)
        at += len(piece)
        progress(len(piece))
    if at != spec.stop:
        raise BadFile(f"{residual}: tensor {name!r} has {at - spec.start} bytes, expected {spec.nbytes}")
    return digest.finish(hasher)


def file_plan(model: Checkpoint, file: Layout) -> FilePlan:
    """Lay out one of the base's files; where the merged model has the same header, its bytes are taken over."""
    for shard in model.shards:
        if str(shard.path.relative_to(model.root)) == file.name and shard.layout == list(file.tensors):
            return plan_file(file.name, file.tensors, header=shard.header())
    return plan_file(file.name, file.tensors, file.metadata, prefix=file.prefix)


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
