"""The truncated SVD against float64 LAPACK: how close to the optimum, and does the certificate tell the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from loratools.linalg.ranks.rules import Absolute, Energy, Fixed, Ratio, SvCumulative
from loratools.linalg.svd.truncated import TruncatedSVD, residual2, truncated_svd
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum

M, N = 640, 576  # both sides over 512: no exact path
MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "i^-0.25": partial(power_law, -0.25),
    "i^-0.5": partial(power_law, -0.5),
    "i^-1": partial(power_law, -1.0),
    "i^-2": partial(power_law, -2.0),
    "signal+noise": signal_and_noise,
    "noise": partial(signal_and_noise, signals=0),
}


def measured(D: Tensor, svd: TruncatedSVD) -> float:
    """Return ‖D - U·S·Vh‖ in float64, the slow and obvious way."""
    return float(torch.linalg.matrix_norm(D.double() - (svd.U.double() * svd.S) @ svd.Vh.double()))


def optimum(D: Tensor, rank: int) -> float:
    """Return √Σ_{i>rank} σᵢ² of the full float64 spectrum."""
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(D.double())[rank:]))


@pytest.mark.parametrize("rank", [8, 32, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_error_is_near_the_optimum_and_printed_truly(name: str, rank: int) -> None:
    D = MATRICES[name](M, N).float()
    svd = truncated_svd(D, rank)
    best, error = optimum(D, rank), measured(D, svd)
    assert svd.method == "krylov"
    assert svd.rank == rank
    assert best * (1 - 1e-6) <= error <= 1.0005 * best
    assert math.sqrt(svd.error2) == pytest.approx(error, rel=1e-4)
    assert svd.norm2 == pytest.approx(float((D.double() ** 2).sum()), rel=1e-12)
    assert svd.relative_error == pytest.approx(error / math.sqrt(svd.norm2), rel=1e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_excess_bounds_hold_and_the_probe_tightens_them(name: str) -> None:
    D = MATRICES[name](M, N).float()
    sure, probed = truncated_svd(D, 16), truncated_svd(D, 16, probe=True)
    excess = max(measured(D, probed) ** 2 - optimum(D, 16) ** 2, 0.0)
    assert excess - 1e-9 * sure.norm2 <= probed.excess_bound <= sure.excess_bound <= sure.error2
    assert probed.excess_bound <= 0.12 * probed.error2
    assert torch.equal(probed.U, sure.U)


def test_a_loose_tolerance_is_told_by_the_estimate() -> None:
    D = power_law(-0.5, M, N).float()
    loose, tight = truncated_svd(D, 32, tolerance=0.1), truncated_svd(D, 32, tolerance=1e-5)
    assert loose.products < tight.products
    excess = measured(D, loose) ** 2 - optimum(D, 32) ** 2
    assert excess <= 3 * loose.excess_estimate <= 0.3 * loose.error2
    assert measured(D, tight) ** 2 - optimum(D, 32) ** 2 <= 1e-5 * tight.error2


def test_wide_is_the_transpose_of_tall() -> None:
    D = power_law(-0.7, M, N).float()
    tall, wide = truncated_svd(D, 20), truncated_svd(D.T.contiguous(), 20)
    assert wide.U.shape == (N, 20)
    assert wide.Vh.shape == (20, M)
    assert torch.allclose(tall.S, wide.S, rtol=1e-6)
    assert measured(D.T, wide) == pytest.approx(measured(D, tall), rel=1e-6)


def test_singular_vectors_are_orthonormal_down_a_steep_spectrum() -> None:
    sigma = 10.0 ** -torch.linspace(0, 5, 40, dtype=torch.float64)
    D = with_spectrum(sigma, M, N).float()
    svd = truncated_svd(D, 36)
    eye = torch.eye(36, dtype=torch.float64)
    assert torch.allclose(svd.U.double().T @ svd.U.double(), eye, atol=3e-3)
    assert torch.allclose(svd.Vh.double() @ svd.Vh.double().T, eye, atol=1e-6)
    assert torch.allclose(svd.S, sigma[:36], rtol=1e-3)
    assert math.sqrt(svd.error2) == pytest.approx(measured(D, svd), rel=1e-3)
    assert math.sqrt(svd.error2) <= 1.0005 * optimum(D, 36)


@pytest.mark.parametrize(("m", "n"), [(64, 900), (900, 64), (1, 50), (50, 1), (1, 1), (200, 150), (512, 530)])
def test_small_sides_are_exact(m: int, n: int) -> None:
    D = power_law(-0.3, m, n).float()
    rank = min(m, n, 96 if m == 512 else 10)
    svd = truncated_svd(D, rank)
    assert svd.method == "gram"
    assert svd.seed is None
    assert svd.excess_estimate == 0
    assert svd.excess_bound < 1e-12 * svd.norm2
    assert torch.allclose(svd.S, torch.linalg.svdvals(D.double())[:rank], rtol=1e-6)
    assert measured(D, svd) == pytest.approx(optimum(D, rank), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(M, N), (100, 700)])
def test_rank_deficient_matrices_show_their_true_rank(m: int, n: int) -> None:
    for true in (1, 3, 16):
        D = with_spectrum(torch.linspace(2, 1, true, dtype=torch.float64), m, n).float()
        svd = truncated_svd(D, 24)
        assert svd.rank == true
        assert svd.relative_error < 1e-6
        assert math.sqrt(svd.error2) == pytest.approx(measured(D, svd), rel=1e-6)


@pytest.mark.parametrize(("m", "n"), [(M, N), (100, 700)])
def test_repeated_rows_and_single_entries_do_no_harm(m: int, n: int) -> None:
    one = torch.zeros(m, n)
    one[3, 5] = -2.5
    svd = truncated_svd(one, 8)
    assert svd.rank == 1
    assert float(svd.S[0]) == pytest.approx(2.5, rel=1e-6)
    assert svd.relative_error < 1e-6
    B, A = svd.factors()
    assert torch.allclose(B @ A, one, atol=1e-6)
    assert truncated_svd(torch.ones(m, n), 8).rank == 1


def test_a_zero_matrix_has_rank_0_and_says_so() -> None:
    svd = truncated_svd(torch.zeros(M, N), 8)
    assert (svd.method, svd.rank, svd.norm2, svd.error2, svd.relative_error) == ("zero", 0, 0.0, 0.0, 0.0)
    assert svd.U.shape == (M, 0)
    assert svd.Vh.shape == (0, N)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    D = torch.ones(M, N)
    D[7, 9] = bad
    with pytest.raises(ValueError, match=r"640 x 576 matrix holds 1 NaN or infinite element;"):
        truncated_svd(D, 4)


@pytest.mark.parametrize(
    "D", [torch.ones(3), torch.ones(0, 4), torch.ones(3, 4, dtype=torch.int64), torch.ones(2, 2, 2)]
)
def test_what_is_no_matrix_is_refused(D: Tensor) -> None:
    with pytest.raises(ValueError, match="a matrix of real numbers with at least one element is needed"):
        truncated_svd(D, 1)


def test_same_seed_same_bits_and_another_seed_the_same_errors() -> None:
    D = power_law(-0.5, M, N).float()
    first, second, other = truncated_svd(D, 16, seed=3), truncated_svd(D, 16, seed=3), truncated_svd(D, 16, seed=4)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.Vh, second.Vh)
    assert (first.error2, first.excess_bound) == (second.error2, second.excess_bound)
    assert not torch.equal(first.U, other.U)
    assert other.relative_error == pytest.approx(first.relative_error, rel=2e-4)


def test_thread_count_changes_rounding_only() -> None:
    D, before = power_law(-0.5, M, N).float(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(truncated_svd(D, Energy(0.5)))
    finally:
        torch.set_num_threads(before)
    assert found[0].rank == found[1].rank
    assert found[0].relative_error == pytest.approx(found[1].relative_error, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.8])
def test_energy_finds_the_smallest_rank_that_meets_it(fraction: float) -> None:
    D = power_law(-0.5, M, N).float()
    energy = (torch.linalg.svdvals(D.double()) ** 2).cumsum(0)
    expected = int((energy < fraction * energy[-1]).sum()) + 1
    svd = truncated_svd(D, Energy(fraction))
    assert svd.rank in (expected, expected + 1)  # a captured energy 1e-4 short of the optimum may need one more
    assert 1 - svd.error2 / svd.norm2 >= fraction


def test_energy_of_a_merged_adapter_finds_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(M, N, generator=generator)
    delta = with_spectrum(torch.linspace(1, 0.3, 16, dtype=torch.float64), M, N)
    D = (W + delta.float()) - W
    svd = truncated_svd(D, Energy(0.999999))
    B, A = svd.factors()
    assert svd.rank == 16
    assert float(torch.linalg.matrix_norm(B.double() @ A.double() - delta)) <= 1e-5 * float(
        torch.linalg.matrix_norm(delta)
    )


def test_ratio_and_absolute_count_like_lapack() -> None:
    D = power_law(-1.0, M, N).float()  # σᵢ = 1/i: σ > 1/20.5 for 20 values
    assert truncated_svd(D, Ratio(1 / 20.5)).rank == 20
    assert truncated_svd(D, Absolute(1 / 90.5)).rank == 90


def test_max_rank_caps_a_rule_and_a_large_rank_is_still_met() -> None:
    D = power_law(-0.1, M, N).float()
    assert truncated_svd(D, Energy(0.99), max_rank=40).rank == 40
    energy = (torch.linalg.svdvals(D.double()) ** 2).cumsum(0)
    assert truncated_svd(D, Energy(0.9999)).rank == int((energy < 0.9999 * energy[-1]).sum()) + 1
    nearly_all = truncated_svd(D, 500)
    assert nearly_all.rank == 500
    assert measured(D, nearly_all) <= 1.0005 * optimum(D, 500)
    assert truncated_svd(D, 5000).rank == N


def test_sv_cumulative_of_a_large_matrix_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sv_cumulative needs every singular value"):
        truncated_svd(power_law(-1.0, M, N).float(), SvCumulative(0.9))


def test_factors_are_balanced_and_multiply_to_the_low_rank_part() -> None:
    svd = truncated_svd(power_law(-1.0, M, N).float(), 12)
    B, A = svd.factors()
    assert torch.allclose(B.double() @ A.double(), (svd.U.double() * svd.S) @ svd.Vh.double(), atol=1e-6)
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-5)
    assert torch.allclose(B.double().norm(dim=0) ** 2, svd.S, rtol=1e-5)


def test_truncating_further_adds_the_energy_let_go() -> None:
    D = power_law(-0.8, M, N).float()
    svd = truncated_svd(D, 24)
    less = svd.truncated(10)
    assert less.rank == 10
    assert math.sqrt(less.error2) == pytest.approx(measured(D, less), rel=1e-5)
    for rank in (0, 25):
        with pytest.raises(ValueError, match=f"rank {rank} was asked of a decomposition of rank 24"):
            svd.truncated(rank)


def test_residual_is_that_of_the_factors_as_stored() -> None:
    D = power_law(-0.5, 300, 200).float()
    B, A = (factor.bfloat16() for factor in truncated_svd(D, 20).factors())
    expected = float(torch.linalg.matrix_norm(D.double() - B.double() @ A.double()) ** 2)
    assert residual2(D, B, A) == pytest.approx(expected, rel=1e-12)


def test_float64_input_is_solved_in_float64() -> None:
    svd = truncated_svd(power_law(-2.0, M, N), Fixed(10), tolerance=1e-9)
    assert svd.U.dtype == torch.float64
    assert torch.allclose(svd.S, torch.arange(1, 11, dtype=torch.float64) ** -2, rtol=1e-9)


def test_a_lowered_float32_precision_is_put_back_and_not_used() -> None:
    D = power_law(-0.5, M, N).float()
    expected = truncated_svd(D, 8)
    torch.set_float32_matmul_precision("medium")
    try:
        found = truncated_svd(D, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.U, expected.U)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_finds_what_the_cpu_finds() -> None:
    D = signal_and_noise(1200, 900).float()
    cpu, gpu = truncated_svd(D, 32, probe=True), truncated_svd(D.cuda(), 32, probe=True)
    assert gpu.U.device.type == "cuda"
    assert gpu.relative_error == pytest.approx(cpu.relative_error, rel=1e-4)
    assert torch.allclose(gpu.S, cpu.S, rtol=1e-4)
    assert math.sqrt(gpu.error2) == pytest.approx(measured(D.cuda(), _moved(gpu)), rel=1e-4)


def _moved(svd: TruncatedSVD) -> TruncatedSVD:
    return replace(svd, S=svd.S.to(svd.U.device))
