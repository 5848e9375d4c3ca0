"""Rounding noise: the ulp of each stored dtype, its spectrum, and the rank that stands above it."""

from __future__ import annotations

import pytest
import torch

from loratools.linalg.ranks.noise import AboveNoise, rounding_edge, ulp
from loratools.linalg.ranks.rules import Spectrum
from loratools.linalg.svd.truncated import truncated_svd
from tests.linalg.matrices import with_spectrum

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_is_the_gap_between_neighbours(dtype: torch.dtype) -> None:
    bits = torch.arange(
        0, 0x7800 if dtype.itemsize == 2 else 0x78, dtype=torch.int16 if dtype.itemsize == 2 else torch.int8
    )
    values = bits.view(dtype).double()
    gaps = values[1:] - values[:-1]
    normal = values[:-1] >= 2.0**-126  # bfloat16's own subnormals lie below float32's normal range: no weights there
    assert int(normal.sum()) > 90
    assert torch.equal(ulp(values[:-1].float(), dtype).double()[normal], gaps[normal])
    assert torch.equal(ulp(-values[:-1].float(), dtype), ulp(values[:-1].float(), dtype))


def test_ulp_by_hand() -> None:
    W = torch.tensor([1.0, 1.99, 2.0, -0.3, 0.0])
    assert ulp(W, torch.bfloat16)[:4].tolist() == [2**-7, 2**-7, 2**-6, 2**-9]
    assert ulp(W, torch.float16)[4] == 2.0**-24
    assert ulp(W, torch.float32)[0] == 2.0**-23
    with pytest.raises(ValueError, match=r"rounding noise is defined for .* not torch.int8"):
        ulp(W, torch.int8)


def test_predicted_noise_is_the_measured_one() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(400, 300, generator=generator) * (1 + 9 * torch.rand(400, 1, generator=generator))
    error = W.bfloat16().float() - W
    energy = float((ulp(W, torch.bfloat16).double() ** 2 / 12).sum())
    assert float(error.double().norm() ** 2) == pytest.approx(energy, rel=0.02)
    assert float(error.double().std()) == pytest.approx((energy / W.numel()) ** 0.5, rel=0.02)
    top = float(torch.linalg.matrix_norm(error.double(), 2))
    assert top <= rounding_edge(W, torch.bfloat16) <= 1.5 * top


def test_noise_of_equal_elements_has_the_marchenko_pastur_edge() -> None:
    edge = rounding_edge(torch.full((400, 100), 1.5), torch.bfloat16)
    assert edge == pytest.approx(2**-7 / 12**0.5 * (20 + 10))


@pytest.mark.parametrize("relative", [0.1, 0.01, 0.003])
@pytest.mark.parametrize(("m", "n"), [(640, 576), (200, 640)])
def test_the_rank_of_an_adapter_merged_in_bf16_is_found(m: int, n: int, relative: float) -> None:
    right = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        outliers = 1 + 20 * (torch.rand(m, 1, generator=generator) > 0.98)
        W = (0.02 * torch.randn(m, n, generator=generator) * outliers).bfloat16().float()
        delta = with_spectrum(torch.linspace(1, 0.5, 16, dtype=torch.float64), m, n, seed).float()
        tuned = (W + delta * (relative * W.norm() / delta.norm())).bfloat16()
        rule = AboveNoise(rounding_edge(tuned.float(), torch.bfloat16))
        right += truncated_svd(tuned.float() - W, rule).rank == 16
    assert right == 5


def test_pure_noise_keeps_one_value_and_a_spike_above_it_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(640, 576, generator=generator)
    D = W.bfloat16().float() - W
    rule = AboveNoise(rounding_edge(W, torch.bfloat16))
    assert truncated_svd(D, rule).rank == 1
    D[5, 7], D[100, 3] = 1.0, 1.0  # as coherent as can be: only the ulp floor can tell them from noise
    assert truncated_svd(D, rule).rank == 2


def test_factors_alone_use_the_given_floor() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert AboveNoise(1.5).rank(Spectrum(sigma, 14.0, (9, 9))) == 2
    assert AboveNoise(0.5).rank(Spectrum(sigma, 14.0, (9, 9), complete=False)) is None
    assert AboveNoise(9.0).rank(Spectrum(sigma, 14.0, (9, 9))) == 1
