"""The random sketch that the iteration begins with."""

from __future__ import annotations

import torch

from loratools.linalg.svd.start import sketched_start
from tests.linalg.matrices import power_law


def test_a_sketch_is_orthonormal_its_seeds_own_and_leans_towards_the_leading_directions() -> None:
    D = power_law(-1.0, 640, 300).float()
    V = sketched_start(D, 16, 0)
    torch.testing.assert_close(V.double().T @ V.double(), torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
    assert V.equal(sketched_start(D, 16, 0))
    assert not V.equal(sketched_start(D, 16, 1))
    captured = float((D @ V).double().square().sum())
    first = float(torch.linalg.svdvals(D.double())[0].square())
    random = float(D.double().square().sum()) * 16 / 300  # what as many random columns hold of it, on the average
    assert captured > 4 * random
    assert captured > 0.8 * first
