"""The basis without torch: orthonormal to rounding, orthogonal to what came before, and honest about dependence."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.linalg.native import delta
from loratools.linalg.svd import basis
from loratools.linalg.svd.basis import Basis, Matrix
from tests.linalg.matrices import power_law, signal_and_noise

pytestmark = pytest.mark.skipif(not delta.available(), reason="the C code is not compiled, or does not serve here")


def test_a_basis_is_orthonormal_and_its_products_are_those_of_d() -> None:
    D = signal_and_noise(700, 640).float().numpy()
    matrix = Matrix.of(D)
    assert matrix is not None
    grown = Basis.grown(matrix, 24, float(np.square(D.astype(float)).sum()), 6e-4, 0)
    assert grown is not None
    V, Y = grown.V.astype(float), grown.Y.astype(float)
    assert np.abs(V.T @ V - np.eye(grown.width)).max() < 2e-6
    assert np.abs(D.astype(float) @ V - Y).max() < 2e-6 * np.abs(Y).max()
    assert np.abs(Y.T @ Y - grown.G).max() < 1e-6 * grown.G.max()
    assert grown.G.trace() == pytest.approx(np.square(Y).sum(), rel=1e-12)


@pytest.mark.parametrize("rows", [True, False])
def test_a_matrix_is_taken_by_its_rows_or_columns(rows: bool) -> None:
    D = power_law(-0.5, 50, 30).float().numpy()
    matrix = Matrix.of(D if rows else np.asfortranarray(D))
    assert matrix is not None
    assert matrix.shape == (50, 30)
    X, Z = (power_law(-0.1, side, 4, seed=2).float().numpy() for side in (30, 50))
    assert matrix.times(X) == pytest.approx(D.astype(float) @ X, abs=1e-6)
    assert matrix.across(Z) == pytest.approx(D.T.astype(float) @ Z, abs=1e-6)
    assert Matrix.of(D[:, ::2]) is None


@pytest.mark.parametrize(
    ("short", "rank", "exact"),
    [(256, 1, True), (257, 32, False), (257, 33, True), (512, 64, False), (600, 299, False), (600, 300, True)],
)
def test_small_sides_and_large_ranks_are_solved_exactly(short: int, rank: int, exact: bool) -> None:
    assert basis.is_exact(short, rank) == exact
