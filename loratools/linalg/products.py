"""Products of a large dense matrix with few columns: in C on float32 in the CPU's memory, torch's elsewhere.

Both are right to float32; the C sums in one order whatever the number of threads, and is several times faster. Where a
processor multiplies bfloat16, a matrix that is rounded to it takes half of that again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loratools.linalg.native import delta


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A matrix in bfloat16, as `serves` takes it, and `lost2` = ‖D − low‖_F², what rounding took of it."""

    low: Tensor
    lost2: float

    @property
    def T(self) -> Rounded:
        """The transpose, which shares memory."""
        return Rounded(self.low.T, self.lost2)

    @staticmethod
    def serves(shape: tuple[int, ...]) -> bool:
        """Tell whether this processor has products with a matrix (m, n) in bfloat16; both sides are even then."""
        return delta.multiplies_bf16() and len(shape) == 2 and shape[0] % 2 == shape[1] % 2 == 0


def times(D: Tensor, X: Tensor) -> Tensor:
    """Return D·X (m, k); D is (m, n) and X (n, k), of one dtype and device.

    D may be that of a `Rounded`: then X in float32 is rounded too, and sums and result are in float32.
    """
    if _served(D, X):
        if _has_rows(D):
            return torch.from_numpy(delta.times(_array(D), X.numpy()))
        if _has_rows(D.T):
            return torch.from_numpy(delta.across(_array(D.T), X.numpy()))
    product: Tensor = (X.T @ D.T).T  # faster than D·X where D itself is a transpose, and never slower
    return product


def across(D: Tensor, X: Tensor) -> Tensor:
    """Return Dᵀ·X (n, k); D is (m, n) and X (m, k), as `times` takes them."""
    if _served(D, X):
        if _has_rows(D):
            return torch.from_numpy(delta.across(_array(D), X.numpy()))
        if _has_rows(D.T):
            return torch.from_numpy(delta.times(_array(D.T), X.numpy()))
    # (XᵀD)ᵀ rather than DᵀX: the product then runs along the rows of D as they lie in memory.
    product: Tensor = (X.T @ D).T
    return product


def both(D: Tensor, X: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return Y = D·X (m, k) and DᵀY (n, k), the same numbers as of `times` and `across`, from one pass over D.

    None where there is no such pass: D has to be in float32 in the CPU's memory, its rows contiguous.
    """
    if D.dtype == torch.float32 and _served(D, X) and _has_rows(D):
        Y, back = delta.both(D.numpy(), X.numpy())
        return torch.from_numpy(Y), torch.from_numpy(back)
    return None


def gram64(X: Tensor, Y: Tensor) -> Tensor | None:
    """Return XᵀY in float64, X (m, a) and Y (m, b) with few columns in float32; None where torch has to do it."""
    if _served(X, Y) and _has_rows(X) and _has_rows(Y):
        return torch.from_numpy(delta.gram(X.numpy(), Y.numpy()))
    return None


def _served(D: Tensor, X: Tensor) -> bool:
    known = D.dtype in (torch.float32, torch.bfloat16) and X.dtype == torch.float32
    return known and D.device.type == X.device.type == "cpu" and delta.available()


def _array(D: Tensor) -> delta.Array:
    """Return a matrix as the C takes it: of bfloat16 its bits."""
    return D.view(torch.int16).numpy().view(np.uint16) if D.dtype == torch.bfloat16 else D.numpy()


def _has_rows(X: Tensor) -> bool:
    return X.stride(1) == 1 or X.shape[1] <= 1
