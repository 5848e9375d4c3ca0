"""Products in stacks against the dense float64 matrix, at every condition of their factors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from loratools.linalg import stacks
from loratools.linalg.stacks import Array, decompose, rounding2, side_by_side

random = np.random.default_rng(0)


def factors(n: int = 4, out: int = 40, r: int = 6, columns: int = 30, condition: float = 1.0) -> tuple[Array, Array]:
    """Return B (n, out, r), whose unit columns have about this condition, and A (n, r, in)."""
    alike = 1 - 1 / condition
    mix = np.eye(r) + alike * (np.ones((r, r)) - np.eye(r))
    return random.standard_normal((n, out, r)) @ mix, random.standard_normal((n, r, columns))


def test_a_sum_stands_side_by_side() -> None:
    terms = [(np.array([0.5, -2.0]), *factors(2, r=3)), (np.array([-1.5, 1.0]), *factors(2, r=5))]
    B, A = side_by_side(terms)
    expected = sum(c[:, None, None] * (left @ right) for c, left, right in terms)
    assert B.shape == (2, 40, 8)
    assert np.abs(B @ A - expected).max() <= 1e-13


def test_float32_factors_are_widened_first() -> None:
    B, A = (factor.astype(np.float32) for factor in factors(2))
    left, right = side_by_side([(np.ones(2), B, A)])
    assert left.dtype == right.dtype == np.float64
    assert np.array_equal(left, B.astype(np.float64))


@pytest.mark.parametrize("condition", [1, 30, 300, 3e3, 1e6, 1e12])
def test_every_condition_gives_the_svd_of_the_dense_matrix(condition: float) -> None:
    B, A = factors(condition=condition)
    found, S = decompose(B, A), np.linalg.svd(B @ A, compute_uv=False)[:, :6]
    assert np.abs(found.sigma - S).max() <= 1e-13 * S.max()
    assert np.all(np.abs(found.sigma / S - 1) <= np.maximum(1e-8, 1e-15 * condition * condition))
    assert found.ranks.tolist() == [6] * 4
    left, right = found.balanced(B, A, 6, range(4))
    assert np.abs(left @ right - B @ A).max() <= 1e-11 * S.max()
    U, s, Vh = np.linalg.svd(B @ A)
    best = (U[:, :, :3] * s[:, None, :3]) @ Vh[:, :3]
    left, right = found.balanced(B, A, 3, [2, 0])
    assert np.abs(left @ right - best[[2, 0]]).max() <= 1e-9 * S.max()
    assert np.abs(np.linalg.norm(left, axis=1) - np.sqrt(found.sigma[[2, 0], :3])).max() <= 1e-9 * S.max()


def test_all_three_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, two, and Householder's QR: by the condition, and by nothing else."""
    passes: list[int] = []
    cholesky = stacks._cholesky
    monkeypatch.setattr(stacks, "_cholesky", lambda unit: passes.append(len(unit)) or cholesky(unit))
    by_qr = {}
    for condition in (1.0, 300.0, 1e6):
        passes.clear()
        by_qr[condition] = len(decompose(*factors(condition=condition)).made), list(passes)
    assert by_qr == {1.0: (0, [4, 4]), 300.0: (0, [4, 1, 1, 1, 1, 4]), 1e6: (4, [4, 4])}


def test_what_cancels_has_rank_0_and_what_repeats_keeps_its_rank() -> None:
    B, A = factors(1, 400, 8, 300)
    two = [(np.array([1.0]), B, A), (np.array([-1.0]), B, A)]
    nothing = decompose(*side_by_side(two))
    assert nothing.ranks.tolist() == [0]
    assert not any(factor.any() for factor in nothing.balanced(*side_by_side(two), 4, [0]))
    again = decompose(*side_by_side([(np.array([1.0]), B, A), (np.array([0.5]), B, A)]))
    assert again.ranks.tolist() == [8]
    assert np.allclose(again.sigma[0, :8], 1.5 * decompose(B, A).sigma[0], rtol=1e-12)
    other = B.astype(np.float32)
    other[0, 0, 0] = np.nextafter(other[0, 0, 0], np.float32(9))  # a difference of one float32 ulp is a difference
    left = side_by_side([(np.ones(1), B.astype(np.float32), A), (-np.ones(1), other, A)])
    assert decompose(*left).ranks.tolist() == [1]


@pytest.mark.parametrize(("out", "r", "columns"), [(3, 7, 20), (20, 7, 3), (1, 1, 1), (5, 5, 5), (4, 9, 4)])
def test_more_columns_than_rows_are_factors_too(out: int, r: int, columns: int) -> None:
    B, A = factors(3, out, r, columns)
    found, S = decompose(B, A), np.linalg.svd(B @ A, compute_uv=False)
    k = min(out, r, columns)
    assert found.sigma.shape == (3, k)
    assert np.abs(found.sigma - S[:, :k]).max() <= 1e-12 * S.max()
    left, right = found.balanced(B, A, k, range(3))
    assert np.abs(left @ right - B @ A).max() <= 1e-12 * S.max()


def test_a_product_has_the_same_numbers_alone_as_in_any_stack() -> None:
    B, A = factors(5)
    B[1], B[3] = factors(1, condition=1e9)[0], 0.0  # by QR, and zero
    whole = decompose(B, A)
    for order in ([4, 1, 0], [2], [3, 3]):
        part = decompose(B[order], A[order])
        assert np.array_equal(part.sigma, whole.sigma[order])
        for mine, theirs in zip(
            part.balanced(B[order], A[order], 4, range(len(order))), whole.balanced(B, A, 4, order), strict=True
        ):
            assert np.array_equal(mine, theirs)
    assert whole.ranks.tolist() == [6, 6, 6, 0, 6]


def test_norms_of_terms_come_from_the_gram_matrices() -> None:
    terms = [(np.array([0.5, -2.0]), *factors(2, r=3)), (np.array([-1.5, 1.0]), *factors(2, r=5))]
    found = decompose(*side_by_side(terms))
    for (start, stop), (c, left, right) in zip([(0, 3), (3, 8)], terms, strict=True):
        norms = np.abs(c) * np.linalg.norm(left @ right, axis=(1, 2))
        assert np.allclose(found.term_norms(start, stop), norms, rtol=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_the_rounding_of_balanced_factors_is_that_of_the_dense_matrices(kind: type) -> None:
    B, A = factors()
    found = decompose(B, A)
    exact = found.balanced(B, A, 5, range(4))
    left, right = (factor.astype(kind).astype(np.float64) for factor in exact)
    dense = np.square(left @ right - exact[0] @ exact[1]).sum((1, 2))
    assert np.allclose(rounding2(found.sigma[:, :5], exact, (left, right)), dense, rtol=1e-6)


def test_what_is_not_finite_shows_in_the_gram_matrices_and_nowhere_else() -> None:
    B, A = factors(3)
    whole = decompose(B, A)
    B[1, 2, 3] = np.nan
    found = decompose(B, A)
    assert [np.isfinite(gram).all() for gram in found.grams[0]] == [True, False, True]
    assert found.ranks.tolist() == [6, 0, 6]
    assert np.array_equal(found.sigma[[0, 2]], whole.sigma[[0, 2]])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: side_by_side([]), "no terms were given"),
        (lambda: side_by_side([(np.ones(4), *factors()), (np.ones(4), *factors(columns=5))]), "but these differ"),
        (lambda: side_by_side([(np.full(4, np.nan), *factors())]), "a weight must be a finite number, not nan"),
        (lambda: side_by_side([(np.ones(4), factors()[0], factors(r=5)[1])]), "factors must be B"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
