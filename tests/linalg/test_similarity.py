"""The measures of the LoRA paper, by hand and against their dense definitions."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.linalg.factored import factored_svd
from loratools.linalg.similarity import amplification, row_space, subspace_similarity

EYE = torch.eye(6, dtype=torch.float64)


def test_subspace_similarity_by_hand() -> None:
    V1, V2 = EYE[[0, 1]], EYE[[0, 2, 1]]
    expected = torch.tensor([[1, 1, 1], [1, 0.5, 1]], dtype=torch.float64)
    assert torch.allclose(subspace_similarity(V1, V2), expected)
    assert torch.equal(subspace_similarity(EYE[:2], EYE[3:5]), torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="subspaces of one space are needed"):
        subspace_similarity(EYE, EYE[:, :3])


def test_similarity_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    A8, A64 = torch.randn(8, 40, generator=generator), torch.randn(16, 40, generator=generator)
    phi = subspace_similarity(row_space(A8), row_space(A64))
    U8, U64 = (torch.linalg.svd(A.double(), full_matrices=False).Vh.T for A in (A8, A64))
    for i, j in ((1, 1), (3, 7), (8, 16), (8, 2)):
        expected = float(torch.linalg.matrix_norm(U8[:, :i].T @ U64[:, :j]) ** 2) / min(i, j)
        assert float(phi[i - 1, j - 1]) == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(
        subspace_similarity(row_space(A8), row_space(A8)).diagonal(), torch.ones(8, dtype=torch.float64)
    )


def test_row_space_drops_dependent_rows() -> None:
    A = torch.ones(3, 5)
    rows = row_space(A)
    assert rows.shape == (1, 5)
    assert torch.allclose(rows.abs(), torch.full((1, 5), 5**-0.5, dtype=torch.float64))
    assert row_space(torch.zeros(2, 5)).shape == (0, 5)


def test_amplification_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(12, 3, generator=generator), torch.randn(3, 9, generator=generator)
    W = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    dense = B.double() @ A.double()
    U, _, Vh = torch.linalg.svd(dense)
    for rank in (None, 2):
        k = rank or 3
        expected = float(dense.norm() / (U[:, :k].T @ W @ Vh[:k].T).norm())
        assert amplification(factored_svd(B, A), W, rank) == pytest.approx(expected, rel=1e-10)
        assert amplification(factored_svd(B, A), lambda V: W @ V, rank) == pytest.approx(expected, rel=1e-10)


def test_amplification_at_its_limits() -> None:
    update = factored_svd(EYE[:, :1], EYE[:1])
    assert amplification(update, 0.25 * EYE) == pytest.approx(4)
    assert amplification(update, torch.diag(torch.tensor([0.0, 1, 1, 1, 1, 1]))) == math.inf
    with pytest.raises(ValueError, match="zero is not defined"):
        amplification(factored_svd(0 * EYE[:, :1], EYE[:1]), EYE)
    with pytest.raises(ValueError, match="asked at rank 2, but the update has rank 1"):
        amplification(update, EYE, 2)
