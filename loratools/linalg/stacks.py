"""Many products ΔW = B·A of one shape at once, in NumPy and float64: stacks B (n, out, r) and A (n, r, in).

The long sides enter by the r × r Gram matrices BᵀB and AAᵀ alone. B = Q·R with R by Cholesky takes a seventh of the
time of a Householder QR, and errs by ε·κ² with κ the condition of B's columns, each scaled to length one: one pass
serves up to κ² = 1e5; up to 1e8 the columns of B·R⁻¹ take a second (CholeskyQR2, Yamamoto et al. 2015), which makes
the error ε·κ; beyond, and for columns that are zero or depend on each other, Householder's QR is what is left. Each
product is worked on by itself, so that no number depends on what else is in its stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_EPS = float(np.finfo(np.float64).eps)
_ONE_PASS, _TWO_PASSES = 1e5, 1e8
"""Squared condition of unit columns up to which one pass, and two, are as good as a QR."""


LEAST = 1e-140
"""Lengths between this and its inverse have squares with all their digits, and sums of these are finite."""
NO_SQUARES = "its factors, or its change, are too large or too small: float64 does not hold their squares"
NUMBERS = 1 << 19
"""Of the factors of one stack, at most, unless one product has more: 4 MB in float64."""

Item = TypeVar("Item")


def batches(items: Iterable[Item], alike: Callable[[Item], Hashable], numbers: Callable[[Item], int],
            most: int = NUMBERS) -> Iterator[list[Item]]:  # fmt: skip
    """Yield items that are `alike` together, in their order, in lists of at most `most` numbers, or of one item.

    Each item is looked at once; `numbers` says how many numbers an item's factors have.
    """
    growing: dict[Hashable, tuple[list[Item], int]] = {}
    for item in items:
        key, size = alike(item), numbers(item)
        batch, total = growing.get(key, ([], 0))
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        growing[key] = batch, total + size
    for batch, _ in growing.values():
        yield batch


def side_by_side(terms: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array]:
    """Return factors of the stack of sums Σᵢ cᵢ·BᵢAᵢ at rank Σrᵢ: exact, for any ranks and signs, without cross terms.

    B = [√|c₁|·B₁ | √|c₂|·B₂ | …], A = [sgn(c₁)√|c₁|·A₁; …] in float64.

    Args:
        terms: (c (n,), B (n, out, r), A (n, r, in)) each, of any float dtype, with c the weight times the scaling.

    Raises:
        ValueError: There are no terms, shapes do not match, or a c is not finite.
    """
    if not terms:
        raise ValueError("there is nothing to add up: no terms were given")
    for c, _, _ in terms:
        if not np.isfinite(c).all():
            raise ValueError(f"a weight must be a finite number, not {c[~np.isfinite(c)][0]}")
    if len({(len(c), *B.shape[:-1], A.shape[-1]) for c, B, A in terms}) > 1:
        shapes = ", ".join(f"{B.shape}·{A.shape}" for _, B, A in terms)
        raise ValueError(f"updates of one matrix must have its shape, but these differ: {shapes}")
    ranks = [B.shape[-1] for _, B, _ in terms]
    (n, out), columns = terms[0][1].shape[:2], terms[0][2].shape[-1]
    left = np.empty((n, sum(ranks), out)).transpose(0, 2, 1)  # of each term the columns lie together
    right = np.empty((n, sum(ranks), columns))
    start = 0
    for (c, B, A), r in zip(terms, ranks, strict=True):
        if A.shape[-2] != r:
            raise ValueError(f"factors must be B (n, out, r) and A (n, r, in), not {B.shape} and {A.shape}")
        root = np.sqrt(np.abs(c))[:, None, None]
        np.multiply(B, root, out=left[:, :, start : start + r], casting="unsafe")
        np.multiply(A, np.copysign(root, c[:, None, None]), out=right[:, start : start + r], casting="unsafe")
        start += r
    return left, right


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The thin SVDs of a stack of products, without their long sides: `balanced` makes those.

    `sigma` (n, k) are the singular values, descending; `ranks` (n,) how many of each are more than the rounding of
    terms as large as Σⱼ‖bⱼ‖·‖aⱼ‖. `grams` are BᵀB and AAᵀ (n, r, r), and `finite` (n,) tells where these, and σ², are
    neither beyond float64 nor so near to zero that it loses digits; elsewhere there is nothing. `changes` (n, r, k) and
    (n, k, r) make the long sides: B·change is U√Σ and change·A is √ΣVᵀ; of products for which no change is as exact
    `made` has those themselves.
    """

    sigma: Array
    ranks: Array
    grams: tuple[Array, Array]
    finite: Array
    changes: tuple[Array, Array]
    made: Mapping[int, tuple[Array, Array]] = field(default_factory=dict)

    def balanced(self, B: Array, A: Array, rank: int, which: Sequence[int]) -> tuple[Array, Array]:
        """Return B' = U√Σ (m, out, rank) and A' = √ΣVᵀ (m, rank, in) of the leading directions of products `which`.

        Directions beyond a product's rank are zero. `B` and `A` are the stacks that were decomposed.
        """
        at = slice(None) if len(which) == len(B) else list(which)
        left = B[at] @ self.changes[0][at, :, :rank]
        right = self.changes[1][at, :rank] @ A[at]
        for place, i in enumerate(which):
            if i in self.made:
                left[place], right[place] = self.made[i][0][:, :rank], self.made[i][1][:rank]
        return left, right

    def term_norms(self, start: int, stop: int) -> Array:
        """Return ‖B[:, start:stop]·A[start:stop]‖_F (n,) of a block of the inner side, from the Gram matrices."""
        left, right = (gram[:, start:stop, start:stop] for gram in self.grams)
        with np.errstate(invalid="ignore", over="ignore"):
            norms: Array = np.sqrt(np.maximum(_sums(left * right), 0.0))
        return norms


def decompose(B: Array, A: Array) -> Decomposition:
    """Return the SVDs of B·A for stacks B (n, out, r) and A (n, r, in) in float64.

    Where an element is NaN or infinite, or float64 does not hold the squares, nothing is `finite`, and the rest is that
    of zeros.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _decomposed(B, A)


def _decomposed(B: Array, A: Array) -> Decomposition:
    n, out, r = B.shape
    columns = A.shape[-1]
    At = A.transpose(0, 2, 1)
    grams = B.transpose(0, 2, 1) @ B, A @ At
    lengths = [np.sqrt(np.einsum("nii->ni", gram)) for gram in grams]
    finite = _all_fit((B, At), lengths)
    floor = np.where(finite, _EPS * max(out, columns) * _sums(lengths[0] * lengths[1]), 0.0)
    k = min(out, r, columns)
    sigma, changes, made = np.zeros((n, k)), (np.zeros((n, r, k)), np.zeros((n, k, r))), {}
    sides = [_triangles(X, gram, length) for X, gram, length in zip((B, At), grams, lengths, strict=True)]
    good = sides[0].exact & sides[1].exact & finite
    if good.any():
        (R_B, inverse_B), (R_A, inverse_A) = ((side.R[good], side.inverse[good]) for side in sides)
        U, S, Vh = np.linalg.svd(R_B @ R_A.transpose(0, 2, 1))
        root = np.sqrt(S)
        sigma[good], changes[0][good] = S, inverse_B @ (U * root[:, None, :])
        changes[1][good] = (root[:, :, None] * Vh) @ inverse_A.transpose(0, 2, 1)
    for i in np.flatnonzero(finite & ~good):
        (Q_B, R_b), (Q_A, R_a) = np.linalg.qr(B[i]), np.linalg.qr(At[i])
        u, s, vh = np.linalg.svd(R_b @ R_a.T, full_matrices=False)
        sigma[i], above = s, np.where(s > floor[i], np.sqrt(s), 0.0)
        made[int(i)] = Q_B @ (u * above), (above[:, None] * vh) @ Q_A.T
    ranks = (sigma > floor[:, None]).sum(-1)
    beyond = np.arange(k) >= ranks[:, None]
    changes[0][np.broadcast_to(beyond[:, None, :], changes[0].shape)] = 0.0
    changes[1][np.broadcast_to(beyond[:, :, None], changes[1].shape)] = 0.0
    return Decomposition(sigma, ranks, grams, finite, changes, made)


def squares_fit(norm: float, terms2: float) -> bool:
    """Tell whether float64 holds the squares of a change, with ‖ΔW‖_F = `norm` and `terms2` those of its terms.

    Example:
        >>> squares_fit(1e-200, 0.0), squares_fit(0.0, 0.0), squares_fit(2.0, 4.0)
        (False, True, True)
    """
    return norm == terms2 == 0 or (norm < 1 / LEAST and LEAST**2 < terms2 < 1 / LEAST**2)


def _all_fit(sides: tuple[Array, Array], lengths: Sequence[Array]) -> Array:
    """Tell of which products (n,) float64 holds all squares: of the factors' columns, and of B·A; zeros are held."""
    left, right = (length.max(-1, initial=0.0) for length in lengths)  # NaN and infinity stay what they are
    fit = np.ones(len(left), bool)
    for size in (left, right, left * right):
        fit &= (size == 0) | ((size > LEAST) & (size < 1 / LEAST))
    for i in np.flatnonzero((left == 0) | (right == 0)):
        fit[i] &= all(length[i].any() or not X[i].any() for X, length in zip(sides, lengths, strict=True))
    return fit


def singular_values(B: Array, A: Array) -> tuple[Array, Array]:
    """Return the singular values of B·A (n, k), those that are rounding as 0, and which products are finite (n,)."""
    found = decompose(B, A)
    above = np.arange(found.sigma.shape[1]) < found.ranks[:, None]
    return np.where(above, found.sigma, 0.0), found.finite


def rounding2(sigma: Array, exact: tuple[Array, Array], stored: tuple[Array, Array]) -> Array:
    """Return ‖B̃Ã − BA‖_F² (n,) of balanced factors and what is stored of them, in float64 and in factor space.

    B̃Ã − BA = δB·A + B·δA + δB·δA with δB = B̃ − B: a sum of small terms, in which nothing cancels. Of balanced factors
    BᵀB = AAᵀ = diag(σ), `sigma` (n, r), so the four r × r products with δ are all there is to form.
    """
    (B, A), (B_stored, A_stored) = exact, stored
    dB, dA = B_stored - B, A_stored - A
    dBt, dAt = dB.transpose(0, 2, 1), dA.transpose(0, 2, 1)
    # With L = [δB | B] and M = [A + δA; δA] the difference is L·M, and its square the trace of (LᵀL)(MMᵀ).
    dB_dB, dB_B, dA_dA, A_dA = dBt @ dB, dBt @ B, dA @ dAt, A @ dAt
    S = np.zeros_like(dB_dB)
    np.einsum("nii->ni", S)[:] = sigma
    first = _sums(dB_dB * (S + A_dA + A_dA.transpose(0, 2, 1) + dA_dA))
    cross = _sums(dB_B * (A_dA + dA_dA))
    total: Array = np.maximum(first + 2 * cross + _sums(S * dA_dA), 0.0)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class _Triangles:
    """R (n, r, r) with X = Q·R, its inverse, and for which of a stack both are as exact as a QR's (n,)."""

    R: Array
    inverse: Array
    exact: Array


def _triangles(X: Array, gram: Array, lengths: Array) -> _Triangles:
    """Return the triangles of a stack X (n, m, r), given its Gram matrices and the lengths of its columns."""
    scale = np.where(np.isfinite(lengths) & (lengths > 0), lengths, 1.0)
    unit = gram / scale[:, :, None] / scale[:, None, :]
    unit[~np.isfinite(unit).all((-2, -1)) | ~(lengths > 0).all(-1)] = 0.0  # not positive definite: left out
    R, inverse, condition2 = _cholesky(unit)
    exact = condition2 <= _TWO_PASSES
    for i in np.flatnonzero(exact & (condition2 > _ONE_PASS)):
        Q = X[i] @ (inverse[i] / scale[i][:, None])
        again, back, rest = _cholesky((Q.T @ Q)[None])
        R[i], inverse[i], exact[i] = again[0] @ R[i], inverse[i] @ back[0], rest[0] <= _ONE_PASS
    return _Triangles(R * scale[:, None, :], inverse / scale[:, :, None], exact)


def _cholesky(unit: Array) -> tuple[Array, Array, Array]:
    """Return R (n, r, r) with RᵀR = `unit`, R⁻¹, and a bound on the squared condition, r·‖R⁻¹‖_F², or infinity."""
    sound = np.ones(len(unit), bool)
    try:
        L = np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:  # one of them has none, and NumPy does not say which
        each = [_lower(gram) for gram in unit]
        sound = np.array([lower is not None for lower in each])
        L = np.stack([np.eye(unit.shape[-1]) if lower is None else lower for lower in each])
    inverse = np.linalg.inv(L)
    bound = np.where(sound, unit.shape[-1] * _sums(inverse * inverse), math.inf)
    return L.transpose(0, 2, 1), inverse.transpose(0, 2, 1), bound


def _lower(gram: Array) -> Array | None:
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None


def _sums(values: Array) -> Array:
    """Return the sum of each item of a stack (n, …)."""
    sums: Array = np.ascontiguousarray(values).reshape(len(values), -1).sum(-1)
    return sums
