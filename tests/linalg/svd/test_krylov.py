"""Spectra that hide from a Krylov iteration: repeated values, numbers near the ends of float32, exactly low rank."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loratools.linalg.native import delta
from loratools.linalg.ranks.rules import Energy, Fixed, Ratio
from loratools.linalg.svd.krylov import Krylov
from loratools.linalg.svd.start import sketched_start
from loratools.linalg.svd.truncated import truncated_svd
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum


def levels(*steps: tuple[float, int], m: int = 640, n: int = 600) -> Tensor:
    """Return a matrix whose singular values are each repeated so often."""
    return with_spectrum(torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in steps]), m, n)


HARD: dict[str, Callable[[], Tensor]] = {
    "identity": lambda: 0.01 * torch.eye(600, dtype=torch.float64),
    "scaled orthogonal": lambda: levels((3.0, 600)),
    "two levels": lambda: levels((10.0, 200), (1.0, 400)),
    "three levels": lambda: levels((10.0, 150), (5.0, 150), (1.0, 300)),
    "equal blocks": lambda: torch.block_diag(*[torch.full((8, 8), 0.5, dtype=torch.float64)] * 80),
    "a level and nothing": lambda: levels((10.0, 200)),
    "a level and a tail": lambda: levels((10.0, 200)) + 1e-3 * power_law(-0.3, 640, 600, seed=9),
    "near 1e-25": lambda: 1e-25 * power_law(-1.0, 640, 600),
    "near 1e30": lambda: 1e30 * power_law(-1.0, 640, 600),
    "small, near 1e-25": lambda: 1e-25 * power_law(-1.0, 80, 60),
    "small, near 1e30": lambda: 1e30 * power_law(-1.0, 80, 60),
    "noise": lambda: signal_and_noise(640, 600, signals=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Fixed(4), Fixed(32), Fixed(128), Energy(0.5), Energy(0.9), Ratio(0.45)], ids=repr)
@pytest.mark.parametrize("name", HARD)
def test_what_was_asked_is_reached_and_the_printed_error_is_true(name: str, rule: Fixed | Energy | Ratio) -> None:
    D = HARD[name]().float()
    sigma = torch.linalg.svdvals(D.double())
    energy = sigma.square().cumsum(0)
    there = int((sigma > 1e-6 * sigma[0]).sum())
    wanted = {
        Fixed: lambda: min(getattr(rule, "r", 0), there),
        Energy: lambda: int((energy < getattr(rule, "fraction", 0) * energy[-1] * (1 - 1e-12)).sum()) + 1,
        Ratio: lambda: int((sigma > getattr(rule, "fraction", 0) * sigma[0]).sum()),
    }[type(rule)]()
    svd = truncated_svd(D, rule)
    norm = float(energy[-1]) ** 0.5
    assert svd.rank == wanted
    true = float((D.double() - (svd.U.double() * svd.S) @ svd.Vh.double()).norm())
    best = float(sigma[svd.rank :].norm())
    assert true <= 1.0005 * best + 1e-7 * norm
    assert math.sqrt(svd.error2) >= true * (1 - 5e-5)
    assert math.sqrt(svd.error2) <= true * (1 + 5e-5)
    assert math.sqrt(svd.error2 - svd.excess_bound) <= best * (1 + 1e-6)


@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_the_excess_on_noise_is_what_was_allowed(rank: int) -> None:
    D = signal_and_noise(1024, 900, signals=0).float()
    best2 = float(torch.linalg.svdvals(D.double())[rank:].square().sum())
    assert truncated_svd(D, rank).error2 - best2 <= 4e-4 * best2


def test_exactly_low_rank_comes_back_to_the_last_digit_of_float32() -> None:
    D = with_spectrum(torch.linspace(1, 0.3, 16, dtype=torch.float64), 700, 600).float()
    svd = truncated_svd(D, 32)
    assert svd.rank == 16
    assert svd.relative_error < 1e-7
    assert svd.relative_error >= 0.999 * float((D.double() - (svd.U.double() * svd.S) @ svd.Vh.double()).norm()) / (
        math.sqrt(svd.norm2)
    )


def test_a_norm_beyond_float64_is_said() -> None:
    with pytest.raises(ValueError, match="squared norm of the 3 x 3 matrix is beyond float64"):
        truncated_svd(torch.full((3, 3), 1e200, dtype=torch.float64), 1)


def test_one_pass_over_the_matrix_finds_what_two_find() -> None:
    if not delta.available():
        pytest.skip("the C code is not compiled here")
    D = power_law(-0.8, 640, 600).float()
    start = sketched_start(D, 16, 0)
    two, one = Krylov(D, start), Krylov(D, start, onward=True)
    for _ in range(4):
        two.step()
        one.step(onward=True)
    assert one.products == two.products == 16 + 4 * 32
    # The same space but for the rounding of float32, and the same values of it; V is orthonormal in both.
    torch.testing.assert_close(one.spectrum(), two.spectrum(), rtol=1e-4, atol=1e-6 * float(two.spectrum()[0]))
    V = one.V.double()
    assert float((V.T @ V - torch.eye(80, dtype=torch.float64)).abs().max()) < 1e-6
    assert float((V - two.V.double() @ (two.V.double().T @ V)).norm()) < 1e-3
    Y = torch.cat(one.parts, 1).double()
    torch.testing.assert_close(Y, D.double() @ V, rtol=0, atol=1e-6 * float(two.spectrum()[0]) ** 0.5)


def test_the_error_is_that_of_the_optimum_with_a_quarter_fewer_products_than_blocks_as_wide_as_the_rank() -> None:
    D = signal_and_noise(1200, 700, signals=64).float()
    sigma = torch.linalg.svdvals(D.double())
    svd = truncated_svd(D, 32)
    best = float(sigma[32:].norm())
    true = float((D.double() - (svd.U.double() * svd.S) @ svd.Vh.double()).norm())
    assert best * (1 - 1e-7) <= true <= 1.0003 * best
    assert abs(svd.error2 - true**2) <= 1e-6 * true**2
    assert svd.error2 - svd.excess_bound <= best**2
    assert svd.products < 256
