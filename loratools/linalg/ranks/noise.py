"""How much of a delta weight is only the rounding of the dtype that it was stored in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.linalg.ranks.rules import Spectrum, at_least_one

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

UNITS = {"BF16": ("<u2", 0x7F80, 2.0**-7), "F16": ("<u2", 0x7C00, 2.0**-10), "F32": ("<u4", 0x7F800000, 2.0**-23)}
"""Dtype, as files name it: how NumPy reads its bits, those of the exponent, and the distance between numbers at 1."""


def ulp(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of `dtype` at each element of W, float32, shape of W.

    ulp(w) = 2^(⌊log₂|w|⌋ - p) with p explicit significand bits, and the subnormal spacing below the normal range.
    Raises ValueError for a dtype that is not a floating point dtype of safetensors.
    """
    import torch

    if str(dtype).removeprefix("torch.") not in _FLOATS:
        raise ValueError(f"rounding noise is defined for {', '.join(f'torch.{d}' for d in _FLOATS)}, not {dtype}")
    info = torch.finfo(dtype)
    # Clearing the significand bits of a float32 leaves the power of two below it.
    power = (W.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_min(max(info.smallest_normal, 2.0**-126)) * info.eps


def unit_squares(raw: bytes | bytearray, dtype: str) -> float:
    """Return Σ ulp(w)² over the numbers whose bytes these are, of a dtype in `UNITS`, in float64 and without torch."""
    import numpy as np

    from loratools.linalg.native import delta

    stored, exponent, eps = UNITS[dtype]
    # Without sign and significand a number is the power of two below it; those below the normal ones are the least.
    powers = np.maximum(np.frombuffer(raw, stored) & exponent, exponent & -exponent).view(np.uint8)
    room = np.empty(powers.size // np.dtype(stored).itemsize, np.float32)
    _, squares, _ = delta.difference(memoryview(powers), memoryview(powers), (dtype, dtype), room)
    return squares * eps**2


def rounding_edge(W: Tensor, dtype: torch.dtype) -> float:
    """Return a bound on the largest singular value of the rounding of W (m, n) to `dtype`; sums in float64.

    Errors are taken as independent and uniform within half a unit in the last place, of variance ulp(W)²/12. Then
    σ₁ ≲ max row norm + max column norm of the standard deviations (Bandeira & van Handel 2016), which is
    std·(√m + √n) when all elements are alike.
    """
    from loratools.linalg.orthonormal import line_sums

    rows, columns = line_sums(W, lambda chunk: ulp(chunk, dtype).double() ** 2 / 12)
    return math.sqrt(float(rows.max())) + math.sqrt(float(columns.max()))


@dataclass(frozen=True, slots=True)
class AboveNoise:
    """Keep the singular values that rounding noise cannot explain.

    σᵣ > min(`edge`, residual edge): `edge` is the `rounding_edge` of the tuned weight. Updates smaller than one ulp
    mostly vanish, and leave far less noise than that; so the floor is never higher than the largest singular value
    that the matrix less its r-1 leading directions can have if it is noise: its max row norm + max column norm.
    """

    edge: float

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the largest r such that every σ up to σᵣ stands above its floor, at least 1."""
        sigma = spectrum.sigma.tolist()
        edges = [self.edge] * len(sigma) if spectrum.residual_edges is None else spectrum.residual_edges().tolist()
        below = (i for i, (value, edge) in enumerate(zip(sigma, edges, strict=False)) if value <= min(self.edge, edge))
        count = next(below, len(sigma))
        return at_least_one(count, spectrum)
