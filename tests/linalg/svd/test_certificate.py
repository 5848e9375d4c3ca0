"""The bounds behind the certificate, where they are tight enough to fail if their constants were wrong."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.linalg.orthonormal import frobenius2
from loratools.linalg.products import Rounded
from loratools.linalg.svd.certificate import energy_beyond, excess_bound, spectral_norm2
from loratools.linalg.svd.krylov import Krylov
from loratools.linalg.svd.start import sketched_start
from loratools.linalg.svd.truncated import truncated_svd
from tests.linalg.matrices import power_law, signal_and_noise


@pytest.mark.parametrize("exponent", [-0.1, -0.5, -1.0])
def test_spectral_norm_of_what_is_left_is_bounded_within_a_factor(exponent: float) -> None:
    D = power_law(exponent, 640, 576).float()
    V = Krylov(D, sketched_start(D, 40, 0)).V
    E = D.double() - (D.double() @ V.double()) @ V.double().T
    true = float(torch.linalg.matrix_norm(E, 2)) ** 2
    for seed in range(5):
        assert true <= spectral_norm2(D, V, seed=seed) <= 1.8 * true


def test_nothing_is_left_beside_a_complete_basis() -> None:
    D = power_law(-1.0, 30, 20).float()
    assert spectral_norm2(D, torch.eye(20), seed=0) == 0
    assert 0 < excess_bound(Krylov.exact(D), 3, frobenius2(D), probe=True, seed=0) < 1e-12 * frobenius2(D)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("matrix", ["flat", "steep", "noisy"])
def test_bounds_hold_at_every_stage_of_the_iteration(matrix: str, steps: int) -> None:
    D = {"flat": power_law(-0.3, 640, 576), "steep": power_law(-1.5, 640, 576), "noisy": signal_and_noise(640, 576)}[
        matrix
    ].float()
    basis, rank, norm2 = Krylov(D, sketched_start(D, 16, 0)), 12, frobenius2(D)
    for _ in range(steps):
        assert basis.step()
    best = float((torch.linalg.svdvals(D.double())[:rank] ** 2).sum())
    excess = best - float(basis.spectrum()[:rank].sum())
    sure = excess_bound(basis, rank, norm2, probe=False, seed=0)
    probed = excess_bound(basis, rank, norm2, probe=True, seed=0)
    assert -1e-6 * norm2 <= excess <= probed <= sure
    assert sure == pytest.approx(norm2 - float(basis.spectrum().sum()), rel=1e-9)


def test_what_rounding_added_to_a_change_is_not_taken_for_energy_beyond() -> None:
    """All numbers of D lie just above the middle between two of bfloat16, so that low is longer than D everywhere.

    Multiplied are vectors that bfloat16 holds: float32 then gives what a processor's products in bfloat16 do.
    """
    signs = torch.randint(0, 2, (700, 520), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    D = (1 + 2**-8 + 2**-12) * signs
    low = D.bfloat16().float()
    lost2 = float((D.double() - low.double()).square().sum())
    V = sketched_start(low, 48, 0).bfloat16().float()
    beyond = energy_beyond(Krylov(low, V), 32, lost2)
    true = float(torch.linalg.svdvals(D.double() @ torch.linalg.qr(V.double())[0])[32:].square().sum())
    assert 0.9 * true <= beyond <= true


def test_the_bound_that_is_stated_counts_what_rounding_took() -> None:
    """error² - bound = (1 - 1e-4)(s - ‖D - low‖)², of one s: the bound of an exact low tells it."""
    D = power_law(-0.2, 640, 576).float()
    low = D.bfloat16().float()
    lost2 = float((D.double() - low.double()).square().sum())
    exact, stated = (truncated_svd(D, 16, rounded=Rounded(low, lost)) for lost in (0.0, lost2))
    assert exact.rounded
    assert stated.rounded
    assert exact.error2 == stated.error2
    left = [math.sqrt((svd.error2 - svd.excess_bound) / (1 - 1e-4)) for svd in (exact, stated)]
    assert left[0] - left[1] == pytest.approx(math.sqrt(lost2), rel=1e-6)
