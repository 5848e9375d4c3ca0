"""Stochastic rounding: up or down at random, so that small changes survive on average where nearest would drop them.

A number y between two neighbours a < b of its dtype becomes b with probability (y − a)/(b − a): its expectation is y,
whatever its size (Gupta et al. 2015, arXiv 1502.02551). The error of one element is up to a whole unit instead of half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = ("BF16", "F16")
"""Where it makes a difference: the arithmetic itself has no more than float32."""

_PER_STEP = 16  # elements for which one step of the counter has random bits: 4 words of 64, 16 bits each
_TINY = 2.0**-14  # below it, F16 has the fixed unit 2^-24


@dataclass(frozen=True, slots=True)
class Stochastic:
    """The random numbers of one tensor, a function of seed, name and position alone: no thread or tile can change them.

    They have 16 bits, as many as float32 has beyond BF16, so for that dtype no bias is left; for F16 it is under 2^-17
    of a unit, and none for its normal numbers.
    """

    seed: int
    name: str
    dtype: str

    def __call__(self, W: torch.Tensor, start: int) -> torch.Tensor:
        """Return the elements from number `start` on rounded, in float32, on the host."""
        import numpy as np
        import torch

        values = W.detach().to("cpu", torch.float32).contiguous().numpy()
        random = self._random(start, values.size).reshape(values.shape)
        bits = values.view(np.uint32)
        if self.dtype == "BF16":
            rounded = ((bits + random) & np.uint32(0xFFFF0000)).view(np.float32)
        else:
            normal = ((bits + (random >> 3)) & np.uint32(0xFFFFE000)).view(np.float32)
            units = np.floor(np.abs(values) * np.float32(2**24) + random * np.float32(2**-16))
            small = np.copysign(units * np.float32(2**-24), values)
            rounded = np.where(np.abs(values) < _TINY, small, normal)
        return torch.from_numpy(rounded)

    def _random(self, start: int, count: int) -> Array:
        """Return numbers below 2^16 for the elements [`start`, `start` + `count`)."""
        from hashlib import blake2b  # most merges draw nothing

        import numpy as np

        key = blake2b(f"{self.seed}:{self.name}".encode(), digest_size=16).digest()
        first = start // _PER_STEP
        source = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=first)
        steps = -(-(start + count) // _PER_STEP) - first
        words = source.random_raw(4 * steps).astype("<u8").view("<u2")
        return words[start - first * _PER_STEP :][:count].astype(np.uint32)
