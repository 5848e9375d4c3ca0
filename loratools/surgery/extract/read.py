"""Read two tensors side by side: ΔW in float32, its norms, the rows that changed, and both digests, in one pass.

Tensors of BF16, F16 and F32 are read without torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import Any

import numpy as np

from loratools.errors import BadFile
from loratools.linalg.native import delta
from loratools.linalg.ranks.noise import UNITS, ulp, unit_squares
from loratools.linalg.stacks import LEAST
from loratools.parallel import Progress, one_torch_thread
from loratools.storage import digest, dtypes, files
from loratools.storage.checkpoint import values
from loratools.storage.checkpoint.logical import stored_parts
from loratools.storage.digest import Hasher
from loratools.storage.header import TensorSpec

TILE = 1 << 20
"""Bytes of one read: small enough that what is done with it stays in the core's cache."""

LOOK = 1 << 10
"""Bytes at the beginning of a tile by which most that differ are told apart."""

_OWN = local()

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one pass over W (base) and W' (fine-tune) found.

    `norm2` = ‖W' − W‖_F², 0 where no value differs, and `base_norm2` = ‖W‖_F², in float64. `rows`
    lists the rows (of the first dimension) that differ, where D is not kept. `D` is W' − W in float32
    (float64 where one of them is), as a matrix (first dimension, the rest), if it was asked for. `digests` are those of
    base and fine-tune, of codes by value (`storage/checkpoint/values.py`). `noise2` is the energy that rounding W' to
    its dtype alone accounts for, from a sample. `low` are the bits of D in bfloat16, if that was asked for and this
    processor has products with it, and `lost2` is what they lack of `norm2`.
    """

    base_norm2: float
    norm2: float
    rows: tuple[int, ...]
    digests: tuple[str, str]
    noise2: float = 0.0
    D: Array | None = field(default=None, repr=False)
    low: Array | None = field(default=None, repr=False)
    lost2: float = 0.0


def one_of(spec: TensorSpec, number: int) -> TensorSpec:
    """Return where one expert of a stack, or one row, lies: `number` along the first side."""
    size = spec.nbytes // spec.shape[0]
    start = spec.start + number * size
    part = None if spec.encoding is None else _Part(spec, number * size)
    return TensorSpec(spec.dtype, spec.shape[1:], spec.file, start, start + size, part)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a weight that is stored as codes, from `offset` on, in bytes of what it reads as."""

    whole: TensorSpec
    offset: int

    @property
    def dtype(self) -> str:
        """The 16-bit dtype that it becomes where it is stored plainly."""
        return self.whole.plain_dtype

    @contextmanager
    def reader(self) -> Iterator[files.Read]:
        """Open it for reading as float32."""
        with files.opened(self.whole) as read:
            yield lambda buffer, offset: read(buffer, self.offset + offset)


def common_dtype(base: TensorSpec, tuned: TensorSpec) -> type[np.floating[Any]]:
    """Return the dtype of the difference of two tensors: float32, or float64 where one of them is."""
    return np.float64 if "F64" in (base.dtype, tuned.dtype) else np.float32


def _columns(spec: TensorSpec) -> int:
    """Return the columns of a tensor seen as a matrix, its first side × the rest."""
    return max(1, spec.parameters // max(1, spec.shape[0] if spec.shape else 1))


def read_delta(
    base: TensorSpec, tuned: TensorSpec, progress: Progress, *, keep: bool, rounded: bool = False,
    hashed: bool = True, hashers: Sequence[Hasher] = (),
) -> Delta:  # fmt: skip
    """Compare two tensors of one shape; `keep` returns D too, with `rounded` also in bfloat16 where that serves.

    Both are valid until this thread keeps the next. Where digests are not wanted, `hashed`, they are empty, but for
    codes, which are compared by them. `hashers` take in
    what is read of base and fine-tune, for digests of more than these.

    Raises `BadFile` where a number is NaN or infinite, or float64 does not hold the squares of a change.
    """
    own = [values.start(spec) for spec in (base, tuned)]
    if base.encoding is tuned.encoding is None and (base.dtype, base.shape) == (tuned.dtype, tuned.shape):
        own[1] = own[0]  # until a byte differs
    hashed = hashed or base.encoding is not None or tuned.encoding is not None
    columns, wide = _columns(tuned), common_dtype(base, tuned)
    shape = tuned.parameters // columns, columns
    D = _scratch("D", shape, wide) if keep else None
    known_to_c = wide is np.float32 and delta.differs(base.dtype, tuned.dtype)
    even = len(shape) == 2 and shape[0] % 2 == shape[1] % 2 == 0
    rounded = rounded and keep and known_to_c and even and delta.multiplies_bf16()
    low = _scratch("low", shape, np.uint16) if rounded else None
    work = np.empty(0, wide)
    base_norm2 = norm2 = lost2 = 0.0
    rows: list[int] = []
    for start, count, raw in files.row_pieces((base, tuned), columns, TILE):
        if hashed:
            if own[1] is own[0] and not _equal(raw):
                own[1] = own[0].copy()
            own[0].update(values.plain(base, raw[0]))
            if own[1] is not own[0]:
                own[1].update(values.plain(tuned, raw[1]))
        for hasher, piece in zip(hashers, raw, strict=False):
            hasher.update(piece)
        if D is None and work.size != count * columns:
            work = np.empty(count * columns, wide)
        target = work.reshape(count, columns) if D is None else D[start : start + count]
        lows = None if low is None else low[start : start + count]
        subtract = _subtract if known_to_c else _subtract_any
        change2, before2, rest2 = subtract(raw, (base.dtype, tuned.dtype), target, lows)
        if not change2 < math.inf and base.dtype == tuned.dtype and bytes(raw[0]) == bytes(raw[1]):
            target[:] = 0  # a number that is not finite, in both: masks of attention have such
            change2, rest2 = 0.0, 0.0
        base_norm2 += before2
        norm2 += change2
        lost2 += rest2
        if change2 and not keep:
            rows += (np.flatnonzero(target.any(1)) + start).tolist()
        progress(sum(len(piece) for piece in raw))
    if wide is np.float64 and own[0] is not own[1] and not (norm2 > LEAST**2 and base_norm2 + norm2 < 1 / LEAST**2):
        _refuse_extremes(base, tuned, columns)
    if norm2 and not (norm2 < math.inf and base_norm2 < math.inf):
        wrong = tuned if base_norm2 < math.inf else base
        raise BadFile(f"NaN or infinity in {wrong.file}, so the change has no norm")
    old, new = (digest.finish(hasher) if hashed else "" for hasher in own)
    if hashed and old == new:  # also of codes and of the 16-bit numbers that they stand for: no change but a rounding
        norm2, rows, D = 0.0, [], None
    noise2 = rounding_energy(tuned) if norm2 and keep else 0.0
    if not norm2:
        D = low = None
    return Delta(base_norm2, norm2, tuple(rows), (old, new), noise2, D, low, lost2)


def _refuse_extremes(base: TensorSpec, tuned: TensorSpec, columns: int) -> None:
    """Raise `BadFile` where all numbers are finite and differ, but float64 does not hold their squares."""
    import torch

    largest = change = 0.0
    for _, _, pieces in files.row_pieces((base, tuned), columns, TILE):
        before, after = (
            torch.frombuffer(piece, dtype=dtypes.to_torch(spec.dtype)).double()
            for piece, spec in zip(pieces, (base, tuned), strict=True)
        )
        if not (bool(before.isfinite().all()) and bool(after.isfinite().all())):
            return
        largest = max(largest, float(before.abs().max()), float(after.abs().max()))
        change = max(change, float((after - before).abs().max()))
    if change:
        raise BadFile(
            f"numbers of up to {largest:.3g} in {tuned.file}, which change by up to {change:.3g}: float64 does not "
            "hold the squares of such numbers, so the change has no norm"
        )


def _equal(raw: list[memoryview]) -> bool:
    if raw[0][:LOOK] != raw[1][:LOOK]:  # as most that differ do
        return False
    before, after = (np.frombuffer(piece, np.uint8) for piece in raw)
    return np.array_equal(before, after)


def _subtract(
    raw: list[memoryview], dtypes: tuple[str, str], target: Array, low: Array | None
) -> tuple[float, float, float]:
    """Store W' − W of a tile in `target`, and in `low`; return ‖W' − W‖², ‖W‖² and what `low` lacks of the first."""
    return delta.difference(raw[0], raw[1], dtypes, target, low)


def _subtract_any(
    raw: list[memoryview], names: tuple[str, str], target: Array, low: Array | None
) -> tuple[float, float, float]:
    """Do the same for every dtype that torch has; nothing is rounded."""
    import torch

    from loratools.linalg.orthonormal import frobenius2

    before, after = (
        torch.frombuffer(piece, dtype=dtypes.to_torch(name)).view(target.shape)
        for piece, name in zip(raw, names, strict=True)
    )
    change = torch.from_numpy(target)
    with one_torch_thread():  # its sums are in another order on another number
        before2 = frobenius2(change.copy_(before))
        return frobenius2(change.copy_(after).sub_(before)), before2, 0.0


def _scratch(name: str, shape: tuple[int, int], dtype: type[np.generic]) -> Array:
    """Return memory of this thread under a name, which lives until it is asked for again: fresh pages cost more."""
    held: Array | None = getattr(_OWN, name, None)
    if held is None or held.dtype != dtype or held.size < shape[0] * shape[1]:
        held = np.empty(shape[0] * shape[1], dtype)
        setattr(_OWN, name, held)
    return held[: shape[0] * shape[1]].reshape(shape)


def read_norm2(spec: TensorSpec, progress: Progress) -> tuple[float, str]:
    """Return ‖W‖_F² and the digest of one tensor, in one pass."""
    from loratools.linalg.orthonormal import frobenius2

    hasher = values.start(spec)
    total = 0.0
    with one_torch_thread():
        for _, (raw,), (W,) in files.row_tiles((spec,), 1, TILE):
            hasher.update(values.plain(spec, raw))
            total += frobenius2(W.double())
            progress(len(raw))
    return total, digest.finish(hasher)


def prefetch(specs: tuple[TensorSpec, ...]) -> None:
    """Ask the system to read tensors ahead, while others are worked on; a hint, which some systems do not take."""
    if hasattr(os, "posix_fadvise"):
        for spec in (part for each in specs for part in stored_parts(each)):
            with files.descriptor(spec.file) as source:
                os.posix_fadvise(source, spec.start, spec.nbytes, os.POSIX_FADV_WILLNEED)


def rounding_energy(spec: TensorSpec) -> float:
    """Estimate Σ ulp(W)²/12, what rounding to its dtype did to a tensor, from about 2^17 elements in eight blocks.

    Of a weight that is stored as codes it is 0: what its quantization did is no rounding of this kind.
    """
    if spec.encoding is not None:
        return 0.0
    width, columns = dtypes.bits(spec.dtype) // 8, _columns(spec)
    total = spec.parameters // columns
    rows = min(total, max(1, (1 << 14) // columns))
    blocks, size = 8, rows * columns * width
    raw = bytearray(blocks * size)
    with files.descriptor(spec.file) as source:
        for block in range(blocks):
            row, place = (total - rows) * block // (blocks - 1), memoryview(raw)[block * size : (block + 1) * size]
            files.read_into(source, place, spec.start + row * columns * width, spec.file)
    return _unit_squares(raw, spec.dtype) / (blocks * rows * columns) / 12 * spec.parameters


def _unit_squares(raw: bytearray, dtype: str) -> float:
    if dtype in UNITS:
        return unit_squares(raw, dtype)
    import torch

    twin = dtypes.to_torch(dtype)
    return float(ulp(torch.frombuffer(raw, dtype=twin), twin).double().square().sum())
