"""Write a base model anew from a merged one, its residual and the adapters, and prove it by the recorded hash."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from loratools.adapter.input import AdapterInput
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.engine.residual import LENGTH, Layout, Lost, Residual, read_bits
from loratools.engine.residual.predict import steps
from loratools.engine.residual.tiles import Coder
from loratools.engine.turns import Queue, Turns
from loratools.errors import BadFile
from loratools.parallel import Progress, no_progress, workers
from loratools.parallel.memory import lent
from loratools.storage import digest, dtypes, files
from loratools.storage.atomic import system
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.codecs import schemes
from loratools.storage.codecs.floats import bytes_of
from loratools.storage.companions import json_text
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan, index_json, plan_file

_PACKED = 1 << 16  # deflated bytes at a time: what is left of them is copied with every piece


def lost_tensors(model: Checkpoint, residual: Residual, inputs: Sequence[AdapterInput], tied: str) -> dict[str, Lost]:
    """Return what the residual brings back, with the placements that the merge had: found again from the base's layout.

    Raises `IncompatibleAdapter` where the adapters do not fit the base that the residual describes, `BadFile` where the
    merged model lacks what the residual builds on.
    """
    described = {name: (dtype, shape) for file in residual.layout for name, dtype, shape in file.tensors}
    config = {key: value for key, value in {**model.config, **residual.config}.items() if value is not None}
    specs = {name: TensorSpec(dtype, shape, model.path, 0, 0) for name, (dtype, shape) in described.items()}
    codes = schemes.find(specs, config).tensors
    shapes = logical(model).shapes | {name: shape for name, (_, shape) in described.items() if name not in codes}
    untied = apply_policy(tuple(each.adapter for each in inputs), specs, config, tied)
    placements: dict[str, list[tuple[Placement, float]]] = {}
    for adapter, origin in zip(untied.adapters, inputs, strict=True):
        for placement in resolve(adapter, shapes, config):
            placements.setdefault(placement.site.tensor, []).append((placement, origin.weight))
    lost = {}
    for name, mode in residual.modes.items():
        dtype, shape = described[name]
        after = model.specs.get(name) if mode != "stored" else None
        fits = after is not None and after.shape == shape and after.dtype in dtypes.FLOATS
        if mode != "stored" and not (fits and mode in ("predicted", "direct")):
            raise BadFile(f"{residual.path}: tensor {name!r} cannot be predicted from this model ({mode})")
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
            system.make_room(target, plan.size)
            files.write_from(target, memoryview(plan.header), 0)

    def write(_: int, name: str) -> tuple[str, str]:
        spec = specs[name]
        pieces = lost_bytes(lost[name], residual) if name in lost else files.chunks(model.specs[name])
        with files.descriptor(spec.file, os.O_WRONLY) as target:
            return name, write_pieces(pieces, name, spec, target, residual.path, progress)

    numbers = {folder / plan.name: number for number, plan in enumerate(plans)}
    order = sorted(specs, key=lambda name: -specs[name].nbytes)
    queue = Queue(Turns(), [(numbers[specs[name].file], name) for name in order])
    with workers(threads) as pool:
        try:
            done = queue.start(pool, threads, write)
            digests = dict(pair for future in done for pair in future.result())
        except BaseException:
            queue.end()
            raise
    for name, metadata in residual.indexes.items():
        part = Path(name).parent
        prefix = next((file.prefix for file in residual.layout if Path(file.name).parent == part), "")
        (folder / name).write_text(json_text(index_json(plans, metadata, part, prefix)), encoding="utf-8", newline="\n")
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
    if file.header is not None:
        return plan_file(file.name, file.tensors, header=file.header, prefix=file.prefix)
    for shard in model.shards:
        own = shard.path.relative_to(model.root).as_posix() == file.name and shard.layout == list(file.tensors)
        if own and shard.metadata == file.metadata:
            return plan_file(file.name, file.tensors, header=shard.header())
    return plan_file(file.name, file.tensors, file.metadata, prefix=file.prefix)


def lost_bytes(lost: Lost, residual: Residual) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor of the base, tile after tile; raise `BadFile` where they cannot be brought back.

    Each is to be used before the next is asked for, which may overwrite it.
    """
    blob = memoryview(files.read_bytes(residual.tensors[lost.name]))
    try:
        yield from _inflated(lost, blob) if lost.after is None else _decoded(lost, lost.after, blob)
    except BadFile as error:
        raise BadFile(f"{residual.path}: tensor {lost.name!r}: {error.message}") from None


def _inflated(lost: Lost, blob: memoryview) -> Iterator[bytes]:
    """Yield the bytes of a tensor that is stored, piece by piece: few bytes can inflate to a thousand times as many."""
    size, done, inflater = dtypes.bits(lost.dtype) * prod(lost.shape) // 8, 0, zlib.decompressobj()
    for at in range(0, len(blob), _PACKED):
        packed = bytes(blob[at : at + _PACKED])
        while packed and done <= size:
            try:
                piece = inflater.decompress(packed, files.CHUNK)
            except zlib.error:
                raise BadFile("it is damaged") from None
            packed, done = inflater.unconsumed_tail, done + len(piece)
            if piece and done <= size:
                yield piece
    if done != size:
        raise BadFile(f"it holds {'more' if done > size else done} bytes, the tensor {size}")


def _decoded(lost: Lost, merged: TensorSpec, blob: memoryview) -> Iterator[memoryview]:
    end = 0

    def take(size: int) -> memoryview:
        nonlocal end
        end += size
        if end > len(blob):
            raise BadFile("it is truncated")
        return blob[end - size : end]

    made = steps(lost.placements)
    for step in made:
        if step.gains is not None:
            step.gains = np.frombuffer(take(4 * step.features), "<f4").astype(np.float32)
    blocks = [take(*LENGTH.unpack(take(LENGTH.size))) for _ in lost.tiles()]
    if end != len(blob):
        raise BadFile("it goes on after its last block")
    columns, coder = lost.matrix[1], Coder(lost, made)
    with files.descriptor(merged.file) as source, lent() as room:
        for (start, stop), block in zip(lost.tiles(), blocks, strict=True):
            after = read_bits(source, merged, start * columns, stop * columns, room)
            yield bytes_of(coder.decode(block, after, start))
