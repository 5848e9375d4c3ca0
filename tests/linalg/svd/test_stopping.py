"""Crowds of nearly equal singular values, where gains that stop are no sign that there is nothing more to gain."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.linalg.native import delta
from loratools.linalg.svd import stopping, usual
from loratools.linalg.svd.basis import Basis, Matrix
from loratools.linalg.svd.truncated import TruncatedSVD, truncated_svd

M, N = 640, 600
Spectrum = list[tuple[int, float, float]]


@cache
def vectors(seed: int) -> tuple[Tensor, Tensor]:
    """Return random singular vectors (M, N) and (N, N)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.linalg.qr(torch.randn(m, N, generator=generator, dtype=torch.float64))[0] for m in (M, N))


def values(spectrum: Spectrum) -> Tensor:
    """Return singular values, so many from one number to another, piece after piece."""
    return torch.cat([torch.linspace(high, low, count, dtype=torch.float64) for count, high, low in spectrum])


def matrix(sigma: Tensor, seed: int = 0) -> Tensor:
    U, V = vectors(seed)
    return ((U * sigma) @ V.T).float()


def power_law(exponent: float) -> Tensor:
    return torch.arange(1, N + 1, dtype=torch.float64) ** exponent


def crowd(count: int, width: float, beneath: float) -> Spectrum:
    return [(count, 1 + width, 1 - width), (N - count, beneath, beneath / 2)]


CROWDS: dict[str, Spectrum] = {
    **{f"100, 5 %, {beneath:g} beneath": crowd(100, 0.05, beneath) for beneath in (0.01, 0.1, 0.3, 0.5, 0.7)},
    **{f"100, {width:g}": crowd(100, width, 0.1) for width in (0.2, 0.1, 0.02, 0.01, 0.003, 1e-4)},
    **{f"{count}, 5 %": crowd(count, 0.05, 0.1) for count in (30, 50, 200, 290)},
    "200, 1 %": crowd(200, 0.01, 0.3),
    "a plateau around the cut": [(8, 5, 2), (40, 1.05, 0.95), (552, 0.8, 0.16)],
    "a longer one": [(8, 5, 2), (200, 1.05, 0.95), (392, 0.8, 0.16)],
    "two crowds": [(40, 2.1, 1.9), (100, 1.05, 0.95), (460, 0.1, 0.05)],
    "a few before a crowd": [(10, 2.1, 1.9), (100, 1.05, 0.95), (490, 0.1, 0.05)],
    "one value and nearly equal ones": [(1, 50, 50), (599, 1, 0.9)],
    "all nearly equal": [(600, 1, 0.9)],
}
STEPS = {f"a step after {count}": [(count, 2.0, 1.0), (N - count, 0.5, 0.25)] for count in (15, 16, 17, 24)}


def check(sigma: Tensor, rank: int, seed: int = 0) -> None:
    """Check the error of the decompositions with and without torch beside the optimum, and what is said of it."""
    D, best2 = matrix(sigma, seed), float(sigma[rank:].square().sum())
    norm2 = float(D.double().square().sum())
    found = usual.leading(D.numpy(), rank, norm2, tolerance=6e-4)
    made: list[usual.Leading | TruncatedSVD] = [
        truncated_svd(D, rank, tolerance=6e-4, norm2=norm2),
        *([found] if found else []),
    ]
    for svd in made:
        factors = (svd.B, svd.A) if isinstance(svd, usual.Leading) else svd.factors()
        B, A = (torch.as_tensor(np.ascontiguousarray(factor)).double() for factor in factors)
        true2 = float((D.double() - B @ A).square().sum())
        assert math.sqrt(true2 / best2) <= 1.0003
        assert svd.error2 == pytest.approx(true2, rel=1e-6)
        assert svd.error2 - svd.excess_bound <= best2 * (1 + 1e-6)


@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_is_sought_through(name: str) -> None:
    check(values(CROWDS[name]), 16)


@pytest.mark.parametrize("rank", [24, 64])
@pytest.mark.parametrize("name", ["100, 5 %, 0.1 beneath", "200, 5 %", "100, 5 %, 0.7 beneath", "a longer one"])
def test_a_crowd_is_sought_through_at_other_ranks(name: str, rank: int) -> None:
    check(values(CROWDS[name]), rank, seed=3)


@pytest.mark.parametrize("exponent", [-0.1, -0.25, -0.5, -1.0])
def test_slow_decay_is_near_the_optimum(exponent: float) -> None:
    check(power_law(exponent), 16)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_near_the_cut_is_near_the_optimum(name: str) -> None:
    check(values(STEPS[name]), 16)


USUAL = {
    "i^-0.25": (power_law(-0.25), 160), "i^-0.5": (power_law(-0.5), 160), "i^-1": (power_law(-1.0), 128),
    "falling": (torch.exp(-0.05 * torch.arange(N, dtype=torch.float64)), 128),
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_where_there_is_no_crowd_no_step_is_added(name: str) -> None:
    sigma, products = USUAL[name]
    assert truncated_svd(matrix(sigma), 16, tolerance=6e-4).products == products


@pytest.mark.skipif(not delta.available(), reason="the C code is not compiled, or does not serve here")
def test_what_a_crowd_hides_is_known_within_a_factor_of_two() -> None:
    """From the basis of a few steps, whose gains say little of it."""
    sigma = values(CROWDS["100, 0.02"])
    D = Matrix.of(matrix(sigma).numpy())
    assert D is not None
    grown, seen = Basis(D, 16, 112, 0), list[float]()
    before = np.zeros(16)
    for step in range(6):
        assert grown.step(onward=False)
        theta = grown.leading(0)[0]
        missing = float(sigma[:16].square().sum()) - float(theta[:16].sum())
        if step > 1:
            assert stopping.is_crowded(theta, 16, 16)
            seen.append(stopping.hidden(theta[:16], before, grown.seen(16), crowded=True) / missing)
        before = theta[:16]
    assert all(1 / 2 < share < 3 for share in seen)


def test_gains_go_on_as_they_did() -> None:
    assert stopping.to_come(4.0, 8.0, crowded=False) == pytest.approx(4.0)
    assert stopping.to_come(1.0, 4.0, crowded=False) == pytest.approx(1 / 3)
    assert stopping.to_come(1.0, 4.0, crowded=True) == pytest.approx(1.0)
    assert stopping.to_come(1.0, 100.0, crowded=False) == pytest.approx(1 / 9)
    assert (
        stopping.to_come(1.0, None, crowded=False) == stopping.to_come(2.0, 1.0, crowded=True) / 2 == pytest.approx(9)
    )


def test_a_crowd_is_many_values_close_to_the_last_one() -> None:
    assert stopping.is_crowded(np.linspace(1.0, 0.91, 24), 12, 16)
    assert not stopping.is_crowded(np.linspace(4.0, 0.5, 24), 12, 16)
    assert not stopping.is_crowded(np.array([4.0, 3.0, *[1.0] * 11, 0.1]), 8, 16)


def test_of_what_is_hidden_only_open_values_count_and_chance_is_taken_off() -> None:
    """Each of 16 columns sees of a value of θ what 3/16 of it times the count are: counts of 3, 1 and 2 here."""
    theta = np.array([4.0, 2.0, 1.0])
    seen = np.sqrt(np.array([3.0, 1.0, 2.0]) * theta / 3)[None].repeat(16, 0)
    assert stopping.hidden(theta, theta - 1, seen, crowded=True) == pytest.approx(2 * 3)
    assert stopping.hidden(theta, theta - [0, 1, 1], seen, crowded=True) == pytest.approx(0.0)
    chance = 2.5 * math.sqrt(2 / 16 * (3 * 9 + 1))
    assert stopping.hidden(theta, theta - 1, seen, crowded=False) == pytest.approx(6 - chance)
