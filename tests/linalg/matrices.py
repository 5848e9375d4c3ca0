"""Matrices whose singular values are known, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """Return a float64 (m, n) matrix with the singular values `sigma` and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, len(sigma), generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64))[0]
    return (U * sigma) @ V.T


def power_law(exponent: float, m: int, n: int, seed: int = 0) -> Tensor:
    """Return a float64 (m, n) matrix with σᵢ = i^exponent for all min(m, n) values."""
    return with_spectrum(torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** exponent, m, n, seed)


def signal_and_noise(m: int, n: int, signals: int = 24, seed: int = 0) -> Tensor:
    """Return white noise with top singular value near 1, and `signals` directions from 5 down to 1.1 times that."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64) / (m**0.5 + n**0.5)
    return noise + with_spectrum(torch.linspace(5, 1.1, signals, dtype=torch.float64), m, n, seed + 1)
