"""Subspaces of many pairs of one shape at once, in NumPy and float64: what `similarity` says of one pair.

Each pair is worked on by itself, so that no number depends on what else is in its stack.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def similarities(V1: Array, V2: Array) -> Array:
    """Return φ(i, j) = ‖V₁[:i]·V₂[:j]ᵀ‖_F²/min(i, j) for all i ≤ k₁ and j ≤ k₂ (n, k₁, k₂), each in [0, 1].

    Args:
        V1: Orthonormal rows (n, k₁, d), the leading direction first.
        V2: Others (n, k₂, d).
    """
    overlaps = np.square(V1 @ V2.transpose(0, 2, 1)).cumsum(1).cumsum(2)
    i, j = np.arange(1, V1.shape[1] + 1)[:, None], np.arange(1, V2.shape[1] + 1)
    shares: Array = np.clip(overlaps / np.minimum(i, j), 0.0, 1.0)
    return shares


def principal(V1: Array, V2: Array) -> Array:
    """Return the principal angles between the subspaces, in radians, ascending (n, min(k₁, k₂)).

    Those under 45° are found by sin θ = σ of what lies outside the larger subspace (Björck & Golub 1973).

    Args:
        V1: Orthonormal rows (n, k₁, d).
        V2: Others (n, k₂, d).
    """
    small, large = sorted((V1, V2), key=lambda V: V.shape[1])
    within = small @ large.transpose(0, 2, 1)
    cosines = np.clip(np.linalg.svd(within, compute_uv=False), 0.0, 1.0)
    found: Array = np.arccos(cosines)
    close = np.square(cosines) > 0.5
    if (which := close.any(1)).any():  # unrelated subspaces have no such angle, and the SVD of long rows takes longest
        outside = np.linalg.svd(small[which] - within[which] @ large[which], compute_uv=False)[:, : cosines.shape[1]]
        sines = np.clip(outside[:, ::-1], 0.0, 1.0)
        found[which] = np.where(close[which], np.arcsin(sines), found[which])
    return found
