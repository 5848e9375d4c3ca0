"""Stacks of subspaces against what is said of each pair by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loratools.linalg import angles
from loratools.linalg.similarity import principal_angles, subspace_similarity


def rows(count: int, rank: int, size: int, seed: int) -> angles.Array:
    """Return a stack of orthonormal rows."""
    drawn = np.random.default_rng(seed).standard_normal((count, size, rank))
    return np.linalg.qr(drawn)[0].transpose(0, 2, 1)


@pytest.mark.parametrize("ranks", [(3, 5), (5, 3), (4, 4), (1, 2)])
def test_stacks_are_what_pairs_are(ranks: tuple[int, int]) -> None:
    first, second = rows(6, ranks[0], 40, 1), rows(6, ranks[1], 40, 2)
    # The last is nearly in the other: an angle that no cosine tells.
    second[-1, 0] = first[-1, 0]
    second[-1] = np.linalg.qr(second[-1].T)[0].T
    shares, turned = angles.similarities(first, second), angles.principal(first, second)
    for i, (one, other) in enumerate(zip(map(torch.from_numpy, first), map(torch.from_numpy, second), strict=True)):
        np.testing.assert_allclose(shares[i], subspace_similarity(one, other).numpy(), atol=1e-14)
        np.testing.assert_allclose(turned[i], principal_angles(one, other).numpy(), atol=1e-14)


def test_a_known_angle() -> None:
    small = 1e-9
    V1, V2 = np.array([[[1.0, 0.0, 0.0]]]), np.array([[[math.cos(small), math.sin(small), 0.0]]])
    assert angles.principal(V1, V2) == pytest.approx(small, rel=1e-6)
    assert angles.similarities(V1, np.array([[[0.6, 0.8, 0.0]]])) == pytest.approx(0.36)


def test_a_pair_is_the_same_alone() -> None:
    first, second = rows(5, 4, 30, 3), rows(5, 2, 30, 4)
    alone = angles.principal(first[2:3], second[2:3]), angles.similarities(first[2:3], second[2:3])
    assert (alone[0] == angles.principal(first, second)[2:3]).all()
    assert (alone[1] == angles.similarities(first, second)[2:3]).all()
