"""Read two tensors side by side: ΔW in float32, its norms, the rows that changed, and both digests, in one pass."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local

import numpy as np
import torch

from loratools.errors import BadFile
from loratools.linalg.native import delta
from loratools.linalg.orthonormal import frobenius2
from loratools.linalg.products import Rounded
from loratools.linalg.ranks.noise import ulp
from loratools.parallel import Progress
from loratools.storage import digest, dtypes, files
from loratools.storage.checkpoint import values
from loratools.storage.checkpoint.logical import stored_parts
from loratools.storage.digest import Hasher
from loratools.storage.header import TensorSpec

TILE = 1 << 20
"""Bytes of one read: small enough that what is done with it stays in the core's cache."""

_OWN = local()


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one pass over W (base) and W' (fine-tune) found.

    `norm2` = ‖W' − W‖_F², 0 where no value differs, and `base_norm2` = ‖W‖_F², in float64. `rows`
    lists the rows (of the first dimension) that differ, where D is not kept. `D` is W' − W in float32
    (float64 where one of them is), as a matrix (first dimension, the rest), if it was asked for. `digests` are those of
    base and fine-tune, of codes by value (`storage/checkpoint/values.py`). `noise2` is the energy that rounding W' to
    its dtype alone accounts for, from a sample. `rounded` is D in bfloat16, if it was asked for and this processor has
    products with it.
    """

    base_norm2: float
    norm2: float
    rows: tuple[int, ...]
    digests: tuple[str, str]
    noise2: float = 0.0
    D: torch.Tensor | None = field(default=None, repr=False)
    rounded: Rounded | None = field(default=None, repr=False)


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


def common_dtype(base: TensorSpec, tuned: TensorSpec) -> torch.dtype:
    """Return the dtype of the difference of two tensors: float32, or float64 where one of them is."""
    return torch.float64 if "F64" in (base.dtype, tuned.dtype) else torch.float32


def _columns(spec: TensorSpec) -> int:
    """Return the columns of a tensor seen as a matrix, its first side × the rest."""
    return max(1, spec.parameters // max(1, spec.shape[0] if spec.shape else 1))


def read_delta(
    base: TensorSpec, tuned: TensorSpec, progress: Progress, *, keep: bool, rounded: bool = False,
    known: tuple[str | None, str | None] = (None, None), hashed: bool = True, hashers: Sequence[Hasher] = (),
) -> Delta:  # fmt: skip
    """Compare two tensors of one shape; `keep` returns D too, with `rounded` also in bfloat16 where that serves.

    Both are valid until this thread keeps the next. `known` are the digests of both, where they were taken before.
    Where they are not wanted, `hashed`, they are empty, but for codes, which are compared by them. `hashers` take in
    what is read of base and fine-tune, for digests of more than these.

    Raises `BadFile` where a number is NaN or infinite.
    """
    own = [values.start(spec) for spec in (base, tuned)]
    hashed = hashed or base.encoding is not None or tuned.encoding is not None
    columns, wide = _columns(tuned), common_dtype(base, tuned)
    shape = tuned.parameters // columns, columns
    D = _scratch("D", shape, wide) if keep else None
    rounded = rounded and wide == torch.float32 and delta.differs(base.dtype, tuned.dtype) and Rounded.serves(shape)
    low = _scratch("low", shape, torch.bfloat16) if keep and rounded else None
    work = torch.empty(0, dtype=wide)
    base_norm2 = norm2 = lost2 = 0.0
    rows: list[int] = []
    for start, raw, pair in files.row_tiles((base, tuned), columns, TILE):
        for one, hasher, spec, piece in zip(known, own, (base, tuned), raw, strict=True):
            if hashed and one is None:
                hasher.update(values.plain(spec, piece))
        for hasher, piece in zip(hashers, raw, strict=False):
            hasher.update(piece)
        count = len(pair[0])
        target = work.resize_(pair[0].shape) if D is None else D[start : start + count]
        lows = None if low is None else low[start : start + count]
        change2, before2, rest2 = _subtract(raw, pair, (base.dtype, tuned.dtype), target, lows)
        base_norm2 += before2
        norm2 += change2
        lost2 += rest2
        if change2 and not keep:
            rows += (target.any(1).nonzero()[:, 0] + start).tolist()
        progress(sum(len(piece) for piece in raw))
    if norm2 and not (norm2 < math.inf and base_norm2 < math.inf):
        wrong = tuned if base_norm2 < math.inf else base
        raise BadFile(f"NaN or infinity in {wrong.file}, so the change has no norm")
    old, new = (one or (digest.finish(hasher) if hashed else "") for one, hasher in zip(known, own, strict=True))
    if hashed and old == new:  # also of codes and of the 16-bit numbers that they stand for: no change but a rounding
        norm2, rows, D = 0.0, [], None
    noise2 = rounding_energy(tuned) if norm2 and keep else 0.0
    small = Rounded(low, lost2) if norm2 and low is not None else None
    return Delta(base_norm2, norm2, tuple(rows), (old, new), noise2, D if norm2 else None, small)


def _subtract(
    raw: list[memoryview], pair: list[torch.Tensor], dtypes: tuple[str, str], target: torch.Tensor,
    low: torch.Tensor | None,
) -> tuple[float, float, float]:  # fmt: skip
    """Store W' − W of a tile in `target`, and in `low`; return ‖W' − W‖², ‖W‖² and what `low` lacks of the first.

    Tiles of the same bytes do not differ.
    """
    before, after = pair
    rest2 = 0.0
    if target.dtype == torch.float32 and delta.differs(*dtypes):
        bits = None if low is None else low.view(torch.int16).numpy().view(np.uint16)
        change2, before2, rest2 = delta.difference(raw[0], raw[1], dtypes, target.numpy(), bits)
    else:
        before2 = frobenius2(target.copy_(before))
        change2 = frobenius2(target.copy_(after).sub_(before))
    if not change2 < math.inf and dtypes[0] == dtypes[1] and bytes(raw[0]) == bytes(raw[1]):
        target.zero_()  # a number that is not finite, in both: masks of attention have such
        return 0.0, before2, 0.0
    return change2, before2, rest2


def _scratch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return memory of this thread under a name, which lives until it is asked for again: fresh pages cost more."""
    held: torch.Tensor | None = getattr(_OWN, name, None)
    if held is None or held.dtype != dtype or held.numel() < shape[0] * shape[1]:
        held = torch.empty(shape[0] * shape[1], dtype=dtype)
        setattr(_OWN, name, held)
    return held[: shape[0] * shape[1]].view(shape)


def read_norm2(spec: TensorSpec, progress: Progress) -> tuple[float, str]:
    """Return ‖W‖_F² and the digest of one tensor, in one pass."""
    hasher = values.start(spec)
    total = 0.0
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
    dtype, columns = dtypes.to_torch(spec.dtype), _columns(spec)
    total = spec.parameters // columns
    rows = min(total, max(1, (1 << 14) // columns))
    blocks, size = 8, rows * columns * dtype.itemsize
    raw = bytearray(blocks * size)
    with files.descriptor(spec.file) as source:
        for block in range(blocks):
            row, place = (total - rows) * block // (blocks - 1), memoryview(raw)[block * size : (block + 1) * size]
            files.read_into(source, place, spec.start + row * columns * dtype.itemsize, spec.file)
    sampled = float(ulp(torch.frombuffer(raw, dtype=dtype), dtype).double().square().sum())
    return sampled / (blocks * rows * columns) / 12 * spec.parameters
