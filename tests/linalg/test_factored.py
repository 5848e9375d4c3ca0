"""Factor algebra against the dense float64 matrix, and the laws it must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.linalg import factored
from loratools.linalg.factored import (
    cosine,
    factored_svd,
    inner_product,
    singular_values,
    squared_norm,
)
from loratools.linalg.ranks.rules import Energy, Spectrum
from loratools.linalg.stacks import side_by_side

Pair = tuple[Tensor, Tensor]


def concatenate(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Pair:
    """Return the factors of a sum, of one layer or a batch."""
    alone = terms[0][1].ndim == 2
    stacked = [(c, B[None], A[None]) if alone else (c, B, A) for c, B, A in terms]
    B, A = side_by_side(
        [(np.full(len(B), c), B.numpy(), A.numpy()) for c, B, A in stacked if c != 0]
        or [(np.zeros(len(B)), B.numpy()[..., :0], A.numpy()[..., :0, :]) for _, B, A in stacked[:1]]
    )
    return (torch.from_numpy(B[0]), torch.from_numpy(A[0])) if alone else (torch.from_numpy(B), torch.from_numpy(A))


seeds = st.integers(0, 999)
sizes = st.integers(1, 12)
weights = st.floats(-3, 3)


def factors(out: int, r: int, columns: int, seed: int, *batch: int) -> Pair:
    """Return random float32 factors B (…, out, r) and A (…, r, columns)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, out, r, generator=generator), torch.randn(*batch, r, columns, generator=generator)


def dense(B: Tensor, A: Tensor) -> Tensor:
    """Return B·A in float64."""
    return B.double() @ A.double()


@settings(deadline=None)
@given(seeds, sizes, sizes, st.lists(st.tuples(sizes, weights), min_size=1, max_size=4))
def test_concatenation_is_the_weighted_sum(seed: int, out: int, columns: int, parts: list[tuple[int, float]]) -> None:
    terms = [(c, *factors(out, r, columns, seed + i)) for i, (r, c) in enumerate(parts)]
    B, A = concatenate(terms)
    expected = sum(c * dense(B_i, A_i) for c, B_i, A_i in terms)
    assert isinstance(expected, Tensor)
    size = 1 + sum(abs(c) * float(dense(B_i, A_i).norm()) for c, B_i, A_i in terms)
    assert B.shape[1] == A.shape[0] == sum(r for r, c in parts if c != 0)
    assert float((B @ A - expected).norm()) <= 1e-14 * size


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes)
def test_svd_is_that_of_the_dense_matrix(seed: int, out: int, r: int, columns: int) -> None:
    B, A = factors(out, r, columns, seed)
    svd, S = factored_svd(B, A), torch.linalg.svdvals(dense(B, A))
    k = svd.S.shape[0]
    assert k == min(out, r, columns)
    assert torch.allclose(svd.S, S[:k], rtol=1e-10, atol=1e-12 * float(S[0]))
    assert torch.allclose((svd.U * svd.S) @ svd.Vh, dense(B, A), atol=1e-12 * float(S[0]))
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(k, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(svd.Vh @ svd.Vh.T, torch.eye(k, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(singular_values(B, A), svd.S, rtol=1e-9, atol=1e-12 * float(S[0]))
    assert float(squared_norm(B, A)) == pytest.approx(float((S**2).sum()), rel=1e-12)


@settings(deadline=None)
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(2, 6), st.data())
def test_truncation_error_is_the_measured_one_and_the_optimum(
    seed: int, out: int, columns: int, r: int, data: st.DataObject
) -> None:
    B, A = factors(out, r, columns, seed)
    svd = factored_svd(B, A)
    rank = data.draw(st.integers(1, svd.S.shape[0]))
    B_r, A_r, error = svd.truncated(rank)
    S = torch.linalg.svdvals(dense(B, A))
    assert float((dense(B, A) - B_r @ A_r).norm()) == pytest.approx(float(error), rel=1e-9, abs=1e-12 * float(S[0]))
    assert float(error) == pytest.approx(float(S[rank:].norm()), rel=1e-9, abs=1e-12 * float(S[0]))
    assert torch.allclose(B_r.norm(dim=0), A_r.norm(dim=1), rtol=1e-9)


@settings(deadline=None)
@given(seeds, st.integers(1, 6))
def test_invariant_under_a_change_of_the_inner_basis(seed: int, r: int) -> None:
    B, A = (factor.double() for factor in factors(10, r, 8, seed))
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(r, r, generator=generator, dtype=torch.float64) + 4 * torch.eye(r, dtype=torch.float64)
    C, D = B @ M, torch.linalg.solve(M, A)
    E, F = factors(10, 3, 8, seed + 1)
    assert torch.allclose(singular_values(C, D), singular_values(B, A), rtol=1e-8, atol=1e-10)
    assert float(squared_norm(C, D)) == pytest.approx(float(squared_norm(B, A)), rel=1e-9)
    assert float(inner_product(C, D, E, F)) == pytest.approx(float(inner_product(B, A, E, F)), rel=1e-8, abs=1e-8)
    assert float(cosine(C, D, B, A)) == pytest.approx(1, abs=1e-9)


@settings(deadline=None)
@given(seeds, weights, weights)
def test_inner_product_is_bilinear_and_that_of_the_dense_matrices(seed: int, a: float, b: float) -> None:
    first, second, third = factors(9, 2, 7, seed), factors(9, 3, 7, seed + 1), factors(9, 4, 7, seed + 2)
    expected = float((dense(*first) * dense(*second)).sum())
    assert float(inner_product(*first, *second)) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    both = concatenate([(a, *second), (b, *third)])
    parts = a * float(inner_product(*first, *second)) + b * float(inner_product(*first, *third))
    assert float(inner_product(*first, *both)) == pytest.approx(parts, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(seeds, st.permutations(range(3)))
def test_the_order_of_the_terms_changes_nothing(seed: int, order: list[int]) -> None:
    terms = [(w, *factors(9, r, 7, seed + r)) for w, r in ((0.5, 2), (-1.5, 3), (2.0, 1))]
    first, second = factored_svd(*concatenate(terms)), factored_svd(*concatenate([terms[i] for i in order]))
    assert torch.allclose(dense(*first.truncated(4)[:2]), dense(*second.truncated(4)[:2]), atol=1e-11)


def test_what_cancels_has_rank_0_and_what_repeats_keeps_its_rank() -> None:
    B, A = factors(400, 8, 300, 0)
    nothing = factored_svd(*concatenate([(1.0, B, A), (-1.0, B, A)]))
    assert int(nothing.rank()) == 0
    assert int(factored_svd(*concatenate([(1.0, B, A), (0.5, B, A)])).rank()) == 8
    assert int(factored_svd(torch.zeros(5, 2), torch.ones(2, 4)).rank()) == 0
    assert float(singular_values(*concatenate([(1.0, B, A), (-1.0, B, A)])).max()) == 0
    assert int((singular_values(*concatenate([(3.0, B, A), (0.5, B, A)])) > 0).sum()) == 8
    # A difference of one float32 ulp is a difference.
    other = B.clone()
    other[0, 0] = torch.nextafter(B[0, 0], torch.tensor(9.0))
    assert int(factored_svd(*concatenate([(1.0, B, A), (-1.0, other, A)])).rank()) == 1


def test_the_difference_of_initial_and_final_factors_is_plain_lora() -> None:
    # PiSSA, OLoRA, CorDA: ΔW = B·A - B₀·A₀.
    B, A = factors(30, 4, 20, 0)
    B0, A0 = B + 0.01 * factors(30, 4, 20, 1)[0], A.clone()
    svd = factored_svd(*concatenate([(2.0, B, A), (-2.0, B0, A0)]))
    assert int(svd.rank()) == 4
    B_r, A_r, error = svd.truncated(4)
    assert torch.allclose(B_r @ A_r, 2 * (dense(B, A) - dense(B0, A0)), atol=1e-12)
    assert float(error) < 1e-12


def test_batches_of_layers_are_the_layers() -> None:
    B, A = factors(7, 3, 5, 0, 4)
    svd, values, norms = factored_svd(B, A), singular_values(B, A), squared_norm(B, A)
    B_r, A_r, errors = svd.truncated(2)
    for layer in range(4):
        one = factored_svd(B[layer], A[layer])
        assert torch.allclose(svd.S[layer], one.S, rtol=1e-12)
        assert torch.allclose(values[layer], one.S, rtol=1e-12)
        assert float(norms[layer]) == pytest.approx(float((one.S**2).sum()), rel=1e-12)
        assert torch.allclose(B_r[layer] @ A_r[layer], dense(*one.truncated(2)[:2]), atol=1e-12)
        assert float(errors[layer]) == pytest.approx(float(one.truncated(2)[2]), rel=1e-9)
    assert svd.rank().tolist() == [3] * 4
    joined = concatenate([(0.5, B, A), (-1.0, B.flip(0), A.flip(0))])
    assert torch.allclose(dense(*joined)[1], 0.5 * dense(B[1], A[1]) - dense(B[2], A[2]))


def test_rules_of_ranks_apply_to_factors() -> None:
    S = factored_svd(*factors(30, 6, 20, 0)).S
    energy = (S**2).cumsum(0) / (S**2).sum()
    rank = Energy(float(energy[2]) - 1e-9).rank(Spectrum(S, float((S**2).sum()), (30, 20)))
    assert rank == 3


def test_half_precision_factors_are_widened_first() -> None:
    B, A = (factor.bfloat16() for factor in factors(40, 4, 30, 0))
    assert torch.allclose(factored_svd(B, A).S, torch.linalg.svdvals(dense(B, A))[:4], rtol=1e-12)


def test_cosine_by_hand_and_of_zero() -> None:
    B, A = factors(6, 2, 5, 0)
    assert float(cosine(B, A, -2 * B, A)) == pytest.approx(-1)
    e, f = torch.eye(4)[:, :1], torch.eye(4)[:1]
    assert float(cosine(e, f, e + torch.eye(4)[:, 1:2], f)) == pytest.approx(math.sqrt(0.5))
    assert float(cosine(B, A, torch.zeros(6, 1), torch.ones(1, 5))) == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: factored_svd(torch.ones(3, 2), torch.ones(3, 4)), "factors must be B"),
        (lambda: factored_svd(torch.ones(3), torch.ones(3, 4)), "factors must be B"),
        (lambda: factored_svd(torch.ones(2, 3, 2), torch.ones(4, 2, 4)), "factors must be B"),
        (lambda: factored_svd(torch.tensor([[math.nan]]), torch.ones(1, 1)), r"factor B \(1, 1\) holds 1 NaN"),
        (lambda: squared_norm(torch.ones(1, 1), torch.tensor([[math.inf]])), r"factor A \(1, 1\) holds 1 NaN"),
        (lambda: inner_product(*factors(3, 1, 4, 0), *factors(3, 1, 5, 0)), "an inner product needs updates of one"),
        (lambda: factored_svd(*factors(3, 2, 4, 0)).truncated(3), "rank 3 was asked of factors of rank 2"),
        (lambda: factored_svd(*factors(3, 2, 4, 0)).truncated(0), "rank 0 was asked of factors of rank 2"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_no_dense_matrix_is_ever_made() -> None:
    # 200 000 x 200 000 in float64 would take 320 GB.
    B, A = factors(200_000, 2, 200_000, 0)
    assert float(squared_norm(B, A)) == pytest.approx(float((factored.singular_values(B, A) ** 2).sum()), rel=1e-10)
