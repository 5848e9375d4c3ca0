"""A changed weight that becomes codes again: tile by tile, by its scheme, measured through the quantization.

The sum is made in float32 as for any other tensor; the scheme's encoder takes it, and what its codes stand for is held
against it: retained = ⟨W'' − W, ΔW⟩ of ⟨ΔW, ΔW⟩ with W'' the numbers of the codes and ΔW = W' − W before them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import lcm, prod
from typing import Any

import numpy as np

from loratools.engine.plan import Recoded
from loratools.engine.task import TILE, Arithmetic, Loss, TensorResult, TensorTask, tile_reader
from loratools.errors import BadFile
from loratools.parallel import Progress
from loratools.storage import digest, files
from loratools.storage.checkpoint import values
from loratools.storage.codecs.floats import Array, bytes_of, unsigned, widen
from loratools.storage.layout import Slot


def run(
    task: TensorTask, recoded: Recoded, arithmetic: Arithmetic, slots: Sequence[Slot], progress: Progress,
    stopped: Callable[[], bool], *, random: bool = False, tile_bytes: int = TILE,
) -> TensorResult:  # fmt: skip
    """Make codes of one changed weight, write its parts to their `slots` in one file, and return what was measured.

    `task` has the output dtype F32, which is what the `arithmetic` gives; `random` rounds to a neighbour by chance.
    Parts that lie in another file are left to its own run. Once `stopped` says True, `InterruptedError` is raised
    before the next tile. Raises `IncompatibleAdapter` for numbers that are not finite.
    """
    spec, (rows, columns) = task.source, task.matrix
    encoding = recoded.encoding
    inner = encoding.columns
    if columns % inner or rows * columns != prod(encoding.shape):
        raise BadFile(f"{task.name}: {[rows, columns]} rows and columns do not fit {encoding.label} {encoding.shape}")
    step = _step(task, arithmetic, encoding.shape, encoding.together, tile_bytes)
    room = arithmetic.room(min(step, rows))
    result = TensorResult(task.name)
    width = _WIDTH[spec.dtype] * columns
    with ExitStack() as stack:
        fill = stack.enter_context(files.opened(spec))
        parts = stack.enter_context(encoding.parts())
        read = tile_reader(fill, room, step, (rows, width), stopped)

        def tiles(hashers: Mapping[str, digest.Hasher]) -> Iterator[tuple[int, Array, Array]]:
            """Yield the first row of the encoding, W and W' of each tile in float32, as the encoding has rows."""
            for start in range(0, rows, step):
                raw = read(start)
                for hasher in hashers.values():
                    hasher.update(values.plain(spec, raw))
                W = _float32(raw, spec.dtype).reshape(-1, inner)
                changed = np.frombuffer(arithmetic.change(raw, start, 0).raw, "<f4").reshape(-1, inner)
                yield start * (columns // inner), W, changed

        if arithmetic.needs_pass:
            for start in range(0, rows, step):
                arithmetic.observe(read(start), start)
        draw = _draw(task.seed, task.name) if random else None
        encoder = encoding.encoder(parts, recoded.grid, draw)
        if encoder.needs_pass:
            for first, _, after in tiles({}):
                encoder.observe(first, after)
        lost = np.empty((rows * columns // inner, inner), np.float32) if recoded.loss_rank else None
        hashers = {name: values.start(spec, name) for name in task.hashes}
        for first, W, after in tiles(hashers):
            coded = encoder.encode(first, after)
            delta = np.subtract(after, W, dtype=np.float64)
            kept = np.subtract(coded, W, dtype=np.float64)
            result.retained += float(np.vdot(kept, delta))
            result.total += float(np.vdot(delta, delta))
            result.changed += float(np.count_nonzero(coded != W))
            kept -= delta
            result.lost += float(np.vdot(kept, kept))
            if lost is not None:
                np.negative(kept, out=lost[first : first + len(kept)], casting="same_kind")
        made = encoder.finish()
    result.digests = {name: digest.finish(hasher, name) for name, hasher in hashers.items()}
    _write(task.target, recoded, slots, made)
    progress(sum(slot.nbytes for slot in slots))
    if lost is not None and result.lost:
        result.loss = _nearest(lost, recoded.loss_rank, task.seed)
    return result


def _nearest(lost: Array, rank: int, seed: int) -> Loss:
    """Return the product of a rank that is nearest to what was lost, each factor with half of the scale."""
    import torch

    from loratools.linalg.svd.truncated import residual2, truncated_svd

    D = torch.from_numpy(lost)
    B, A = truncated_svd(D, min(rank, *D.shape), seed=seed).factors()
    return Loss(B.contiguous().numpy(), A.contiguous().numpy(), residual2(D, B, A))


def _write(target: int, recoded: Recoded, slots: Sequence[Slot], made: Mapping[str, Array]) -> None:
    """Write the parts that were made, and as the base has them those that were not."""
    module = recoded.encoding.module
    places = {slot.name: slot for slot in slots}
    for part, name in module.names.items():
        if (slot := places.get(name)) is None:
            continue
        raw = bytes_of(np.ascontiguousarray(made[part])) if part in made else files.read_bytes(module.specs[part])
        if len(raw) != slot.nbytes:
            raise ValueError(f"{name}: {len(raw)} bytes were made, and {slot.nbytes} are expected")
        files.write_from(target, memoryview(raw), slot.offset)


_WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def _step(task: TensorTask, arithmetic: Arithmetic, shape: tuple[int, ...], together: int, tile_bytes: int) -> int:
    """Return the rows of a tile: whole blocks of the arithmetic and of the scheme, which begin anew in each matrix."""
    rows, columns = task.matrix
    per = columns // shape[-1]
    block = lcm(together, per) // per
    if len(shape) > 2 and shape[-2] % together:
        block = max(1, shape[-2] // per)
    block = lcm(block, arithmetic.together)
    return min(max(block, tile_bytes // (4 * columns) // block * block), max(rows, 1))


def _float32(raw: memoryview, dtype: str) -> Array:
    return widen(np.frombuffer(raw, unsigned(dtype)), dtype, np.float32)


def _draw(seed: int, name: str) -> Callable[[tuple[int, ...]], Array]:
    """Return what draws uniform numbers in [0, 1), the same for a seed and a tensor's name on every machine."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))

    def draw(shape: tuple[int, ...]) -> Any:
        return generator.random(shape, np.float32)

    return draw
