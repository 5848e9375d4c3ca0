"""Orthonormal bases: orthonormal whatever the columns, spanning what they span, and dropping what is not there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.linalg.orthonormal import (
    change_of_basis,
    extend,
    frobenius2,
    gram,
    line_sums,
    orthonormal_columns,
    product64,
)

from .matrices import with_spectrum


def departure(Q: Tensor) -> float:
    """Return max |QᵀQ - I| in float64."""
    Q = Q.double()
    return float((Q.T @ Q - torch.eye(Q.shape[1], dtype=torch.float64)).abs().max()) if Q.shape[1] else 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 12), st.floats(0, 12), st.sampled_from([torch.float32, torch.float64]))
@example(2, 12, 12.0, torch.float64)  # two passes leave 34 eps
@example(20, 9, 12.0, torch.float64)  # 5,726 eps
@example(74, 5, 6.0, torch.float32)  # one pass leaves 573 eps
def test_columns_of_any_condition_become_orthonormal(seed: int, b: int, decades: float, dtype: torch.dtype) -> None:
    Y = with_spectrum(10.0 ** -torch.linspace(0, decades, b, dtype=torch.float64), 60, b, seed).to(dtype)
    Q = orthonormal_columns(Y)
    eps = torch.finfo(dtype).eps
    assert departure(Q) < 8 * eps
    # What is left of each column outside span(Q) is rounding: of Y's dtype, or of a Gram matrix in float64.
    left = Y.double() - Q.double() @ (Q.double().T @ Y.double())
    assert float((left.norm(dim=0) / Y.double().norm(dim=0)).max()) < max(200 * eps, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_zero_and_wildly_scaled_columns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(50, 4, generator=generator, dtype=torch.float64).to(dtype)
    zero = torch.zeros(50, 1, dtype=dtype)
    assert orthonormal_columns(torch.cat([Y, zero, Y[:, :2] * 3, Y[:, 2:3] - Y[:, 3:]], 1)).shape == (50, 4)
    scaled = orthonormal_columns(Y * torch.tensor([1e-20, 1.0, 1e10, 1e-9], dtype=dtype))
    assert scaled.shape == (50, 4)
    assert departure(scaled) < 8 * torch.finfo(dtype).eps
    assert orthonormal_columns(zero).shape == (50, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.floats(0, 9))
def test_extending_stays_orthogonal_even_where_little_is_new(seed: int, decades: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    V = orthonormal_columns(torch.randn(80, 20, generator=generator))
    old = V @ torch.randn(20, 6, generator=generator)
    W = old + 10.0**-decades * torch.randn(80, 6, generator=generator)
    Q = extend(V, W)
    assert departure(torch.cat([V, Q], 1)) < 2e-6
    assert Q.shape[1] == 6 or decades > 4


def test_columns_that_add_nearly_the_same_stay_orthogonal_to_the_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    V = orthonormal_columns(torch.randn(80, 20, generator=generator))
    same = torch.randn(80, 1, generator=generator).expand(80, 6) + 3e-5 * torch.randn(80, 6, generator=generator)
    Q = extend(V, V @ torch.randn(20, 6, generator=generator) + same)
    assert Q.shape == (80, 6)
    assert departure(torch.cat([V, Q], 1)) < 1e-6


def test_what_lies_in_the_span_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    V = orthonormal_columns(torch.randn(80, 20, generator=generator))
    assert extend(V, V[:, :5].clone()).shape == (80, 0)
    assert extend(V[:, :0], V).shape == (80, 20)


def test_float64_sums_in_chunks_equal_whole_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.randn(3000, 700, generator=generator), torch.randn(3000, 5, generator=generator)
    assert torch.allclose(gram(X, Y), X.double().T @ Y.double(), rtol=1e-12)
    assert torch.allclose(
        product64(Y, torch.ones(5, 2, dtype=torch.float64)), Y.double().sum(1, keepdim=True).repeat(1, 2)
    )
    assert frobenius2(X) == pytest.approx(float((X.double() ** 2).sum()), rel=1e-13)
    rows, columns = line_sums(X)
    assert torch.allclose(rows, (X.double() ** 2).sum(1))
    assert torch.allclose(columns, (X.double() ** 2).sum(0))


def test_a_change_of_basis_makes_orthonormal_what_hardly_depends_on_each_other() -> None:
    Y = with_spectrum(10.0 ** -torch.linspace(0, 1, 6, dtype=torch.float64), 60, 6, 3) * 1e-3
    R = change_of_basis(Y.T @ Y)
    assert R is not None
    assert R.equal(R.triu())
    assert departure(Y @ R) < 1e-12
    Y[:, 5] = Y[:, 0] + 1e-3 * Y[:, 1]
    assert change_of_basis(Y.T @ Y) is None
    Y[:, 5] = 0
    assert change_of_basis(Y.T @ Y) is None
