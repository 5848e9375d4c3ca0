"""The eigenvalues of a small symmetric matrix, and the leading vectors: those of LAPACK, of every kind of spectrum."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.linalg.native import eigen

N = 96


def turned(values: np.ndarray) -> np.ndarray:
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))[0]
    G = (Q * values) @ Q.T
    return (G + G.T) / 2


def wilkinson(n: int) -> np.ndarray:
    """Return W(n)⁺, whose largest eigenvalues come in pairs that agree to all digits."""
    return np.diag(abs(np.arange(n) - n // 2).astype(float)) + np.eye(n, k=1) + np.eye(n, k=-1)


SPECTRA = {
    "even": np.linspace(1, 2, N), "steep": 10.0 ** -np.arange(N), "repeated": np.repeat([3.0, 1.0], N // 2),
    "nearly repeated": 1 + 1e-13 * np.arange(N), "pairs": np.repeat(np.arange(N // 2), 2) + 1e-13 * np.arange(N),
    "one dominates": np.r_[1e6, np.ones(N - 1)], "of low rank": np.r_[np.arange(1.0, 21), np.zeros(N - 20)],
    "of both signs": np.linspace(-1, 1, N), "tiny": 1e-30 * np.arange(1.0, N + 1), "huge": 1e30 * np.arange(1.0, N + 1),
}  # fmt: skip
MATRICES = {
    **{name: turned(values) for name, values in SPECTRA.items()},
    "the identity": np.eye(N), "zero": np.zeros((N, N)), "ones": np.ones((N, N)),
    "diagonal": np.diag(np.random.default_rng(1).standard_normal(N)), "Wilkinson's": wilkinson(61),
    "equal blocks": np.kron(np.eye(5), wilkinson(13)),
}  # fmt: skip


def check(G: np.ndarray, count: int) -> None:
    theta, X = eigen.leading(G, count)
    exact, size = np.linalg.eigvalsh(G)[::-1], max(np.abs(G).sum(1).max(), 1e-300)
    assert (theta.shape, X.shape) == ((len(G),), (len(G), count))
    assert (np.diff(theta) <= 0).all()
    assert np.abs(theta - exact).max() <= 1e-14 * size
    assert np.abs(eigen.leading(G, 0)[0] - exact).max() <= 1e-14 * size
    if count:
        assert np.abs(G @ X - X * theta[:count]).max() <= 1e-14 * size
        assert np.abs(X.T @ X - np.eye(count)).max() <= 1e-12


@pytest.mark.parametrize("count", [1, 32, 61])
@pytest.mark.parametrize("name", MATRICES)
def test_they_are_those_of_lapack(name: str, count: int) -> None:
    check(MATRICES[name], count)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 33, 112, 193])
def test_any_size_and_number_of_vectors(n: int) -> None:
    Y = np.random.default_rng(n).standard_normal((n + 20, n))
    for count in {0, 1, min(n, 5), n}:
        check(Y.T @ Y, count)


def test_where_there_is_no_compiler_lapack_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_library", lambda: (None, 0))
    assert not eigen.available()
    check(turned(np.linspace(1, 2, 40)), 8)
    check(turned(np.linspace(1, 2, 40)), 0)


@pytest.mark.skipif(not eigen.available(), reason="the C code is not compiled here")
def test_the_upper_half_and_what_lies_beside_a_matrix_do_not_count() -> None:
    G, held = turned(np.linspace(1, 2, 40)), np.full((40, 50), np.nan)
    held[:, :40] = np.tril(G)
    for one, other in zip(eigen.leading(held[:, :40], 8), eigen.leading(G, 8), strict=True):
        assert one.tobytes() == other.tobytes()
    with pytest.raises(ValueError, match="is not rows of float64"):
        eigen.leading(G.astype(np.float32), 8)
    with pytest.raises(ValueError, match="is not rows of float64"):
        eigen.leading(held.T, 8)
