"""A few hundred numbers of a change ΔW of many matrices, whose cosines are near those of the changes themselves.

For each matrix m (rows, columns) a hash of its name and shape throws every row and every column into one of K bins,
with a sign: matrices S (K, rows) and T (K, columns) with one ±1 in each column. Entry k of the sketch is

    φ(ΔW)[k] = Σₘ Σ_{i + j ≡ k mod K} (Sₘ·ΔWₘ·Tₘᵀ)[i, j],

a random ±1 of every element of ΔW, added up in a random bin (tensor sketch: Pham and Pagh 2013). φ is linear in ΔW, so
it does not depend on the factors: ΔW = B·A is never multiplied out, S·B and T·Aᵀ are one addition for each element.

Signs and bins of two elements are independent, so E⟨φ(X), φ(Y)⟩ = Σₘ⟨Xₘ, Yₘ⟩ exactly, and

    Var⟨φ(X), φ(Y)⟩ ≤ (1 + κ)·(‖X‖²‖Y‖² + ⟨X, Y⟩²)/K,   κ = Σₘ (‖XₘᵀYₘ‖² + ‖XₘYₘᵀ‖²)/(‖X‖²‖Y‖²) at most,

for four elements at the corners of a rectangle share signs and bins. κ is about 2/(modules·rank), and 2 for a single
module of rank one. The cosine of two sketches errs as a correlation of K pairs does: by √(1 + κ)·(1 − c²)/√K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from hashlib import shake_128

import torch
from torch import Tensor

from loratools.linalg.delta import Delta

SIZE = 256
"""Numbers of a sketch, 1 kB in float32: the cosine of unlike changes errs by 0.063, that of changes at 0.9 by 0.012."""


_TOGETHER = 512  # columns that are transformed at once, or those of one matrix: 1 MB of either side


def standard_error(cosine: float) -> float:
    """Return the standard error of the cosine of two sketches, where no single direction is most of a change.

    It is (1 − c²)/√K.
    """
    return (1 - min(cosine * cosine, 1.0)) / math.sqrt(SIZE)


def sketch(changes: Iterable[tuple[str, Delta]]) -> Tensor:
    """Return the sketch of a change, float64 (SIZE,).

    Args:
        changes: Each matrix that is changed, by its name: two changes of one weight need the same name and shape to be
            seen as such. A name may come more than once; the changes are added up.
    """
    # The sum over i + j ≡ k of a product of two vectors is their circular convolution: a product of their transforms.
    total = torch.zeros(SIZE // 2 + 1, dtype=torch.complex128)
    left, right = list[Tensor](), list[Tensor]()  # of several matrices, which are transformed together
    for name, delta in changes:
        rows, columns = delta.shape
        L, R = delta.binned(_bins(name, "rows", rows, columns), _bins(name, "columns", columns, rows), SIZE)
        left.append(L)
        right.append(R)
        if sum([each.shape[1] for each in left]) >= _TOGETHER:
            total += _convolved(left, right)
            left, right = [], []
    if left:
        total += _convolved(left, right)
    made: Tensor = torch.fft.irfft(total, SIZE)
    return made


def _convolved(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the transform of the sum of the columns' convolutions, complex128 (SIZE/2 + 1,)."""
    first, second = (torch.fft.rfft(torch.cat(side, 1).mT.contiguous()) for side in (left, right))
    summed: Tensor = (first * second).sum(0)
    return summed


@lru_cache(maxsize=2048)
def _bins(name: str, side: str, length: int, other: int) -> Tensor:
    """Return a number for each row or column: its bin, plus `SIZE` where its sign is −1; int32 (length,).

    Its bits are those of SHAKE-128 over name, side and shape, 16 for each: the same everywhere and always.
    """
    stream = shake_128(f"loratools.sketch.v1\0{name}\0{side}\0{length}\0{other}".encode()).digest(2 * length)
    words = torch.frombuffer(bytearray(stream), dtype=torch.uint8).reshape(length, 2).int()
    return words[:, 0] + SIZE * (words[:, 1] & 1)
