"""The primitive under every merge: a tensor changed row tile by row tile, at the speed of the disk, in constant memory.

A tile of about a megabyte is read into a reused buffer, widened to float32 (float64 for float64), changed in place by
every term, rounded once, and written. It stays in the core's cache from the read to the write; digests and retention
are fed from the same tile. Tiles depend on the tensor's shape alone, so the bytes do not depend on threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING

from loratools.adapter.kinds import Refinable, Term
from loratools.adapter.site import Site
from loratools.engine.arithmetic.torch import Workspace
from loratools.engine.stochastic import Stochastic
from loratools.errors import IncompatibleAdapter
from loratools.parallel import Progress
from loratools.storage import digest, dtypes, files
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import torch

TILE = 1 << 20
"""Bytes of one tile, about: it is cut at whole rows."""

SAMPLE = 16
"""Retention is measured on one tile in this many, and on at least one of each tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorTask:
    """One output tensor: `source` bytes, changed by `terms`, stored as `dtype` at `offset` of the file `target`.

    `terms` act in this order, in float64 where `wide` says so or a dtype is F64, else in float32. `stochastic` rounds
    at random, where it is given.
    """

    name: str
    source: TensorSpec
    dtype: str
    target: int
    offset: int
    terms: Sequence[tuple[Site, Term]] = ()
    hashes: Sequence[str] = ()
    retention: str = "sample"
    seed: int = 0
    wide: bool = False
    stochastic: Stochastic | None = None


@dataclass(slots=True)
class TensorResult:
    """What was measured on the way: base digests by algorithm, and the sums behind the delta retention.

    retained = ⟨W' − W, ΔW⟩ and total = ⟨ΔW, ΔW⟩ over the sampled tiles, in float64, scaled up to the whole tensor.
    """

    name: str
    digests: Mapping[str, str] = field(default_factory=dict)
    retained: float = 0.0
    total: float = 0.0
    changed: float = 0.0
    warnings: list[str] = field(default_factory=list)


def run(
    task: TensorTask,
    workspace: Workspace,
    progress: Progress,
    stopped: Callable[[], bool],
    tile_bytes: int = TILE,
) -> TensorResult:
    """Write one output tensor and return what was measured.

    Raises `IncompatibleAdapter` when the result is not finite in the output's dtype.
    """
    import torch

    spec = task.source
    rows, columns = _matrix(task)
    stored, out = dtypes.to_torch(spec.dtype), dtypes.to_torch(task.dtype)
    work = torch.float64 if task.wide or torch.float64 in (stored, out) else torch.float32
    step = max(1, min(rows, tile_bytes // max(1, columns * max(stored.itemsize, out.itemsize))))
    block = lcm(*(term.together for _, term in task.terms))
    step = max(block, step - step % block)
    tiles = range(0, rows, step)
    sampled = sampled_tiles(task.name, task.seed, task.retention if task.terms else "off", len(tiles))
    fresh = [not any(site.meets(other) for other, _ in task.terms[:i]) for i, (site, _) in enumerate(task.terms)]
    keep_base = any(term.needs_base and not first for (_, term), first in zip(task.terms, fresh, strict=True))
    tile = workspace.tile(step * columns, stored, out, work)
    width = columns * stored.itemsize
    hashers = {name: digest.start_tensor(spec.dtype, spec.shape, name) for name in task.hashes}
    result = TensorResult(task.name)
    delicate = _delicate(task)
    with files.descriptor(spec.file) as source:
        if any(term.needs_pass for _, term in task.terms):
            for start in tiles:
                stop = min(start + step, rows)
                seen, _ = tile.read(source, spec.start + start * width, stop - start, columns)
                for site, term in task.terms:
                    if term.needs_pass and (met := site.overlap(start, stop)):
                        term.observe_rows(seen[met[0], slice(*site.columns)], met[1])
        for index, start in enumerate(tiles):
            if stopped():
                raise InterruptedError
            stop = min(start + step, rows)
            W, raw = tile.read(source, spec.start + start * width, stop - start, columns)
            for hasher in hashers.values():
                hasher.update(raw)
            base = tile.copy_of(W) if keep_base or index in sampled else None
            for (site, term), first in zip(task.terms, fresh, strict=True):
                if met := site.overlap(start, stop):
                    inside = (met[0], slice(*site.columns))
                    term.apply_rows(W[inside], met[1], None if first or base is None else base[inside])
            rounded, data = tile.rounded(task.stochastic(W, start * columns) if task.stochastic else W)
            _check_finite(task, W, rounded)
            for site, term, bound in delicate:
                if met := site.overlap(start, stop):
                    inside = (met[0], slice(*site.columns))
                    found = tile.below(rounded[inside], _bits(bound * term.gain(met[1]), out))
                    _refine(term, found, tile.stored(W)[inside], rounded[inside], met[1].start)
            if index in sampled and base is not None:
                _measure(result, base, W, rounded, len(tiles) / len(sampled))
            files.write_from(task.target, data, task.offset + start * columns * out.itemsize)
            progress(len(data))
    result.digests = {name: digest.finish(hasher, name) for name, hasher in hashers.items()}
    return result


def _matrix(task: TensorTask) -> tuple[int, int]:
    """Return how the tensor is seen: the view that its sites share, or first side × rest."""
    views = {site.matrix for site, _ in task.terms}
    if len(views) > 1:
        raise ValueError(f"{task.name}: sites of different views {sorted(views)}")
    if views:
        return views.pop()
    rows = task.source.shape[0] if task.source.shape else 1
    return (rows, task.source.parameters // rows) if rows else (0, 0)


def sampled_tiles(name: str, seed: int, retention: str, tiles: int) -> frozenset[int]:
    """Choose the tiles of a tensor on which retention is measured, by the seed and the tensor's name alone."""
    if retention == "off" or not tiles:
        return frozenset()
    if retention == "full":
        return frozenset(range(tiles))
    start = zlib.crc32(f"{seed}:{name}".encode()) % min(tiles, SAMPLE)
    return frozenset(range(start, tiles, SAMPLE))


def _check_finite(task: TensorTask, W: torch.Tensor, rounded: torch.Tensor) -> None:
    # One cheap sum finds any infinity or NaN; F16 can overflow in the rounding, so there the rounded values count.
    suspect = rounded if task.dtype == "F16" or task.stochastic else W
    if task.terms and not bool(suspect.sum(dtype=W.dtype).isfinite()) and not bool(suspect.isfinite().all()):
        raise IncompatibleAdapter(
            f"{task.name}: the merged values are not finite in {task.dtype}",
            hint="Either the base has infinities or NaN there, or the weights overflow this dtype.",
        )


def _delicate(task: TensorTask) -> list[tuple[Site, Refinable, float]]:
    """Return the sites where float32 may not do, each with a magnitude below which it shows (before any gain).

    The error of a float32 sum is about 2^-24 of its largest term, which `bound` limits; it exceeds a unit in the last
    place of a p-bit result only below 2^(p-24) of that. A factor of four is for the length of the sum.
    """
    if task.dtype not in ("BF16", "F16") or task.wide or task.stochastic:
        return []
    scale = 2.0 ** (dtypes.MANTISSA[task.dtype] - 22)
    return [(site, term, term.bound() * scale) for site, term in task.terms if isinstance(term, Refinable)]


def _bits(limit: float, dtype: torch.dtype) -> int:
    """Return a number, rounded to a 16-bit float dtype, as the integer of its bits."""
    import torch

    return int(torch.tensor([limit], dtype=dtype).view(torch.int16))


def _refine(term: Refinable, found: torch.Tensor, stored: torch.Tensor, rounded: torch.Tensor, first_row: int) -> None:
    """Compute the few results that were found too small again, in float64, and round them once."""
    if len(found):
        rows, columns = found // rounded.shape[1], found % rounded.shape[1]
        values = term.elements(stored[rows, columns].double(), rows + first_row, columns)
        rounded[rows, columns] = values.to(rounded.device, rounded.dtype)


def _measure(result: TensorResult, base: torch.Tensor, W: torch.Tensor, rounded: torch.Tensor, scale: float) -> None:
    import torch

    # A few rows at a time: whole tiles in float64 would leave the cache.
    step = max(1, (1 << 16) // W.shape[1])
    for start in range(0, len(W), step):
        part = slice(start, start + step)
        before = base[part].double().flatten()
        delta = W[part].double().flatten().sub(before)  # not in place: a float64 tile is its own double
        kept = rounded[part].to(W.device, torch.float64).flatten().sub(before)
        result.retained += scale * float(kept.dot(delta))
        result.total += scale * float(delta.dot(delta))
        result.changed += scale * float(torch.count_nonzero(kept))
