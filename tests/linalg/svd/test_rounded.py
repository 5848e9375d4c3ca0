"""Directions found by products in bfloat16: no worse than float32's, and what is said of them is as true."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from loratools.linalg.orthonormal import gram
from loratools.linalg.products import Rounded
from loratools.linalg.ranks.rules import Absolute, Energy, Ratio
from loratools.linalg.svd.certificate import energy_beyond
from loratools.linalg.svd.krylov import Krylov
from loratools.linalg.svd.start import sketched_start
from loratools.linalg.svd.truncated import truncated_svd
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum

pytestmark = pytest.mark.skipif(not Rounded.serves((2, 2)), reason="this processor does not multiply bfloat16")

M, N = 960, 700


def tail(values: int, beyond: float, m: int, n: int) -> Tensor:
    """Return a matrix of `values` singular values from 1 to 0.5, and all others `beyond` times that."""
    sigma = torch.full((min(m, n),), beyond, dtype=torch.float64)
    sigma[:values] = torch.linspace(1, 0.5, values, dtype=torch.float64)
    return with_spectrum(sigma, m, n)


def low_rank(m: int, n: int) -> Tensor:
    return with_spectrum(torch.linspace(2, 1, 16, dtype=torch.float64), m, n)


def scaled(factor: float, m: int, n: int) -> Tensor:
    return factor * power_law(-0.3, m, n)


MATRICES: dict[str, tuple[Callable[[int, int], Tensor], bool]] = {
    "noise": (partial(signal_and_noise, signals=0), True),
    "signal+noise": (signal_and_noise, True),
    "flat": (partial(tail, 0, 1.0), True),
    "i^-0.25": (partial(power_law, -0.25), True),
    "i^-0.5": (partial(power_law, -0.5), True),
    "half of it in the tail": (partial(tail, 40, 0.1), True),
    "tiny": (partial(scaled, 1e-9), True),
    "large": (partial(scaled, 1e9), True),
    "beyond float32's squares": (partial(scaled, 1e-30), False),
    "i^-2": (partial(power_law, -2.0), False),
    "low rank": (low_rank, False),
    "a tail of 1e-8": (partial(tail, 20, 1e-8), False),
}


def rounded(D: Tensor) -> Rounded:
    low = D.bfloat16()
    return Rounded(low, float((D.double() - low.double()).square().sum()))


def tail2(D: Tensor, rank: int) -> float:
    """Return Σ_{i>rank} σᵢ² of the full float64 spectrum."""
    return float(torch.linalg.svdvals(D.double())[rank:].square().sum())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("name", MATRICES)
def test_errors_are_as_near_the_optimum_and_as_truly_said(name: str, rank: int, turned: bool) -> None:
    make, suffices = MATRICES[name]
    D = make(N, M).float().T if turned else make(M, N).float()
    svd, plain = truncated_svd(D, rank, tolerance=6e-4, rounded=rounded(D)), truncated_svd(D, rank, tolerance=6e-4)
    B, A = svd.factors()
    true2, best2 = float((D.double() - B.double() @ A.double()).square().sum()), tail2(D, rank)
    assert svd.rounded is suffices
    assert svd.rank == plain.rank
    if suffices:
        assert svd.error2 == pytest.approx(true2, rel=1e-6)
        assert true2 <= max(1.0006 * best2, 1.0001 * plain.error2)  # pure noise resists both alike
        assert svd.error2 - svd.excess_bound <= best2 * (1 + 1e-9)
        # of what lies beyond the rank about as much is proved as float32 would
        assert svd.excess_bound <= 1.2 * plain.excess_bound + 0.05 * svd.error2
    else:
        assert torch.equal(svd.U, plain.U)
        assert (svd.error2, svd.excess_bound) == (plain.error2, plain.excess_bound)


@pytest.mark.parametrize("rule", [Energy(0.3), Energy(0.7), Ratio(0.3), Absolute(0.2)])
def test_a_rule_chooses_the_rank_by_values_of_float32(rule: Energy | Ratio | Absolute) -> None:
    D = power_law(-0.4, M, N).float()
    svd, plain = truncated_svd(D, rule, rounded=rounded(D)), truncated_svd(D, rule)
    sigma = torch.linalg.svdvals(D.double())
    assert svd.rank == plain.rank
    assert torch.allclose(svd.S, sigma[: svd.rank], rtol=2e-3)


def test_who_probes_gets_float32() -> None:
    D = power_law(-0.3, M, N).float()
    probed = truncated_svd(D, 16, probe=True, rounded=rounded(D))
    assert not probed.rounded
    assert torch.equal(probed.U, truncated_svd(D, 16, probe=True).U)


@pytest.mark.parametrize("coarse", [False, True])
def test_what_is_proved_to_lie_beyond_does_so(coarse: bool) -> None:
    """With float64 products of D and the projector; a D that bfloat16 holds exactly loses nearly nothing."""
    D = power_law(-0.2, M, N).float()
    D = D if coarse else D.bfloat16().float()
    small = rounded(D)
    basis = Krylov(D, sketched_start(small.low, 32, 0), low=small.low)
    basis.step()
    V = basis.V.bfloat16().double()
    seen = torch.linalg.svdvals(D.double() @ torch.linalg.qr(V)[0]).square()
    beyond, true = energy_beyond(basis, 20, small.lost2), float(seen[20:].sum())
    assert (small.lost2 > 0) is coarse
    assert beyond <= true
    assert beyond >= (0.97 if coarse else 0.985) * true
    assert torch.allclose(basis.G, gram(torch.cat(basis.parts, 1), torch.cat(basis.parts, 1)), rtol=1e-4, atol=1e-5)
    basis.restarted = True
    assert energy_beyond(basis, 20, small.lost2) == 0
