"""The measures of the LoRA paper, by hand and against their dense definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loratools.linalg.factored import factored_svd
from loratools.linalg.similarity import (
    amplification,
    principal_angles,
    projected,
    random_directions,
    subspace_similarity,
)

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
    A8, A64 = (torch.randn(r, 40, generator=generator, dtype=torch.float64) for r in (8, 16))
    V8, V64 = (torch.linalg.svd(A, full_matrices=False).Vh for A in (A8, A64))
    phi = subspace_similarity(V8, V64)
    for i, j in ((1, 1), (3, 7), (8, 16), (8, 2)):
        # By the projections onto the spans, which know nothing of the bases: tr(P₁P₂) = ‖V₁V₂ᵀ‖².
        P1, P2 = (torch.linalg.pinv(V[:k]) @ V[:k] for V, k in ((V8, i), (V64, j)))
        assert float(phi[i - 1, j - 1]) == pytest.approx(float(torch.trace(P1 @ P2)) / min(i, j), rel=1e-10)
    assert torch.allclose(subspace_similarity(V8, V8).diagonal(), torch.ones(8, dtype=torch.float64))


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


@pytest.mark.parametrize(("ranks", "turned"), [((3, 5), 0.3), ((4, 4), 1e-9), ((2, 6), 0.0)])
def test_principal_angles_are_those_of_numpy_and_small_ones_are_kept(ranks: tuple[int, int], turned: float) -> None:
    generator = torch.Generator().manual_seed(3)
    V1 = torch.linalg.qr(torch.randn(12, ranks[0], generator=generator, dtype=torch.float64))[0].T
    V2 = torch.linalg.qr(torch.randn(12, ranks[1], generator=generator, dtype=torch.float64))[0].T
    cosines = np.linalg.svd(V1.numpy() @ V2.numpy().T)[1]
    np.testing.assert_allclose(np.cos(principal_angles(V1, V2).numpy()), cosines, atol=1e-13)
    np.testing.assert_allclose(principal_angles(V2, V1).numpy(), principal_angles(V1, V2).numpy(), atol=1e-12)
    rotated = EYE[:2].double().clone()
    rotated[0, 0], rotated[0, 5] = math.cos(turned), math.sin(turned)
    np.testing.assert_allclose(principal_angles(EYE[:2], rotated).numpy(), [0, turned], rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="of one space"):
        principal_angles(EYE[:2], EYE[:2, :3])


def test_random_directions_are_those_of_a_gaussian_matrix_and_overlap_as_chance_says() -> None:
    first, again, other = (random_directions(4, 50, 7, draw) for draw in (0, 0, 1))
    assert torch.equal(first, again)
    torch.testing.assert_close(first @ first.T, torch.eye(4, dtype=torch.float64))
    assert not torch.equal(first, other)
    overlaps = [
        float(subspace_similarity(*(random_directions(4, 50, seed, d) for d in (0, 1)))[-1, -1]) for seed in range(200)
    ]
    assert np.mean(overlaps) == pytest.approx(4 / 50, rel=0.1)


def test_projected_is_the_norm_of_the_middle() -> None:
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(W.double())
    assert projected(W, U[:, :2], Vh[:2].T) == pytest.approx(float(np.linalg.norm(np.linalg.svd(W.double())[1][:2])))
