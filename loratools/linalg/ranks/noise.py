"""How much of a delta weight is only the rounding of the dtype that it was stored in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.linalg.orthonormal import row_chunks
from loratools.linalg.ranks.rules import Spectrum, at_least_one

# Explicit bits of the significand, and exponent of the smallest normal number.
_FLOATS: dict[torch.dtype, tuple[int, int]] = {
    torch.float64: (52, -1022),
    torch.float32: (23, -126),
    torch.float16: (10, -14),
    torch.bfloat16: (7, -126),
    torch.float8_e4m3fn: (3, -6),
    torch.float8_e5m2: (2, -14),
}


@dataclass(frozen=True, slots=True)
class RoundingNoise:
    """The rounding error of a stored matrix W, taken as independent and uniform within half a unit in the last place.

    `std` is the root of the mean variance ulp(W)²/12 per element; `edge` bounds the largest singular value of such
    noise: σ₁ ≲ max row norm + max column norm of the standard deviations (Bandeira & van Handel 2016), which is
    std·(√m + √n) when all elements are alike. `energy` is its expected ‖N‖_F².
    """

    std: float
    edge: float
    energy: float


def ulp(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of `dtype` at each element of W, float32, shape of W.

    ulp(w) = 2^(⌊log₂|w|⌋ - p) with p explicit significand bits, and the subnormal spacing below the normal range.
    Raises ValueError for a dtype that is not a floating point dtype of safetensors.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"rounding noise is defined for {', '.join(str(d) for d in _FLOATS)}, not {dtype}")
    bits, smallest = _FLOATS[dtype]
    # Clearing the significand bits of a float32 leaves the power of two below it.
    power = (W.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_min(2.0 ** max(smallest, -126)) * 2.0**-bits


def rounding_noise(W: Tensor, dtype: torch.dtype) -> RoundingNoise:
    """Return the rounding noise of a matrix W (m, n) whose elements were rounded to `dtype`; sums in float64."""
    rows: list[Tensor] = []
    columns = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
    for chunk in row_chunks(W):
        variance = ulp(chunk, dtype).double() ** 2 / 12
        rows.append(variance.sum(1))
        columns += variance.sum(0)
    energy = float(columns.sum())
    edge = math.sqrt(float(torch.cat(rows).max())) + math.sqrt(float(columns.max()))
    return RoundingNoise(math.sqrt(energy / W.numel()), edge, energy)


@dataclass(frozen=True, slots=True)
class AboveNoise:
    """Keep the singular values that rounding noise cannot explain.

    σᵣ > min(`edge`, residual edge): `edge` is `RoundingNoise.edge` of the tuned weight. Updates smaller than one ulp
    mostly vanish, and leave far less noise than that; so the floor is never higher than the largest singular value
    that the matrix less its r-1 leading directions can have if it is noise: its max row norm + max column norm.
    """

    edge: float

    def rank(self, spectrum: Spectrum) -> int | None:
        """Return the largest r such that every σ up to σᵣ stands above its floor, at least 1."""
        floor = torch.full_like(spectrum.sigma, self.edge)
        if spectrum.residual_edges is not None:
            floor = torch.minimum(floor, spectrum.residual_edges()[: len(floor)])
        count = int((spectrum.sigma > floor).to(torch.int64).cumprod(0).sum())
        return at_least_one(count, spectrum)
