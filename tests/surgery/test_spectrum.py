"""The spectrum of an adapter, against the singular values of the dense ΔW in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.cli.inspect import bars
from loratools.surgery.spectrum import spectrum
from tests.surgery.models import Lora, lora, random, save_adapter

SHAPES = {"layers.0.up": (48, 30), "layers.0.down": (30, 48), "layers.10.up": (48, 30), "layers.9.up": (48, 30)}


def dense(given: Lora, module: str) -> Tensor:
    A, B = given.factors[module]
    return given.alpha / len(A) * B.double() @ A.double()


def test_numbers_are_those_of_the_dense_change(tmp_path: Path) -> None:
    given = lora(SHAPES, rank=6)
    found = spectrum(save_adapter(tmp_path / "a", given))
    assert [one.module for one in found.modules] == ["layers.0.down", "layers.0.up", "layers.9.up", "layers.10.up"]
    for one in found.modules:
        sigma = torch.linalg.svdvals(dense(given, one.module))[:6]
        torch.testing.assert_close(torch.tensor(one.sigma, dtype=torch.float64), sigma, rtol=1e-10, atol=0)
        share = sigma / sigma.sum()
        assert (one.rank, one.true_rank, one.shape) == (6, 6, SHAPES[one.module])
        assert one.norm == pytest.approx(float(dense(given, one.module).norm()), rel=1e-12)
        assert one.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-10)
        assert one.effective_rank == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-10)
    assert found.norm == pytest.approx(math.hypot(*(one.norm for one in found.modules)), rel=1e-12)
    assert found.parameters == 4 * 6 * 78


def test_needed_ranks_are_the_least_that_keep_the_energy(tmp_path: Path) -> None:
    left, _ = torch.linalg.qr(random(40, 5, dtype=torch.float64))
    right, _ = torch.linalg.qr(random(30, 5, seed=1, dtype=torch.float64))
    sigma = torch.tensor([10.0, 1.0, 0.9, 0.5, 0.01], dtype=torch.float64)  # energies 100, 1, 0.81, 0.25, 1e-4
    factors = {"m": (right.T.float().contiguous(), (left * sigma).float().contiguous())}
    found = spectrum(save_adapter(tmp_path / "a", Lora(factors, alpha=5)))
    (one,) = found.modules
    assert one.needed == (3, 4)  # of 102.06, two keep 0.9896 and three 0.9975
    assert found.needed_parameters == (3 * 70, 4 * 70)


def test_a_rank_that_is_not_used_is_seen(tmp_path: Path) -> None:
    A, B = random(4, 20), random(24, 4, seed=1)
    A[3], A[2] = 2 * A[1], 0
    found = spectrum(save_adapter(tmp_path / "a", Lora({"m": (A, B), "zero": (A.clone(), B * 0)})))
    assert [(one.rank, one.true_rank) for one in found.modules] == [(4, 2), (4, 0)]
    assert found.modules[1].needed == (0, 0)
    assert found.modules[0].needed[1] == 2


def test_bars_fall_with_the_logarithm() -> None:
    assert bars([1.0, 0.1, 0.01, 0.001, 0.0]) == "█▆▃  "
    assert bars([0.0]) == ""
    assert len(bars([1.0 / i for i in range(1, 129)])) == 32
    assert len(bars([1.0] * 33)) == 17
