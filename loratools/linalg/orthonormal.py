"""Orthonormal bases that survive dependent columns, on CPU and CUDA by the same steps.

Everything here rests on small Gram matrices in float64. They cost a few percent of one product with the matrix that
is decomposed, need no Householder QR (slow on CUDA), and are factored on the CPU, so that both devices agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.linalg import products

# Columns are dependent when float64 Cholesky leaves less than this of a unit column; then directions are dropped.
_DEPENDENT = 1e-4
_APART = 0.03
# Below this one pass is not enough, and after a second of float64 it is looked at whether it was.
_CLEAR = 0.01
_PASSES = 3
# Elements widened to float64 at a time: bounds the extra memory, and keeps it in the cache.
_CHUNK = 1 << 20
# Columns up to which C forms a Gram matrix faster than torch.
_FEW = 256


def row_chunks(X: Tensor, elements: int = _CHUNK) -> tuple[Tensor, ...]:
    """Return X (m, n) as views of consecutive rows, of about `elements` elements each."""
    return torch.split(X, max(1, elements // max(1, X.shape[1])))


def gram(X: Tensor, Y: Tensor) -> Tensor:
    """Return XᵀY in float64 on the CPU; X is (m, a), Y is (m, b)."""
    if max(X.shape[1], Y.shape[1]) <= _FEW and (summed := products.gram64(X, Y)) is not None:
        return summed
    G = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    rows = max(1, _CHUNK // max(1, X.shape[1], Y.shape[1]))
    for start in range(0, len(X), rows):
        G += X[start : start + rows].double().T @ Y[start : start + rows].double()
    return G.cpu()


def product64(X: Tensor, Y: Tensor) -> Tensor:
    """Return X·Y in float64, X (m, k) widened a few rows at a time; Y is (k, r) in float64."""
    return torch.cat([rows.double() @ Y for rows in row_chunks(X)])


def frobenius2(X: Tensor) -> float:
    """Return ‖X‖_F² of a matrix, summed in float64; NaN or infinite exactly when an element is (float32 input)."""
    flat = (rows.double().flatten() for rows in row_chunks(X, 1 << 16))
    return float(sum(values @ values for values in flat))


def line_sums(X: Tensor, change: Callable[[Tensor], Tensor] = torch.square) -> tuple[Tensor, Tensor]:
    """Return the sums over the rows (m,) and over the columns (n,) of `change(X)`, X (m, n) in float64, by rows.

    By default those are the squared lengths of rows and columns.
    """
    columns = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    rows: list[Tensor] = []
    for chunk in row_chunks(X):
        values = change(chunk.double())
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def orthonormal_columns(Y: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of Y: Q (m, k) with QᵀQ = I and k ≤ b.

    Y is (m, b), finite. Columns are scaled to length one first; directions whose singular value is then ≤ 8·eps of Y's
    dtype, or 3e-8, the rounding of a Gram matrix, if that is more, are dropped as noise. CholeskyQR
    with a float64 Gram matrix (Yamamoto et al. 2015), with an eigendecomposition of the same Gram matrix where columns
    are dependent; neither can fail on finite input.
    """
    floor = 8 * torch.finfo(Y.dtype).eps
    Q: Tensor = _unit_columns(Y.double())
    again = Y.dtype == torch.float64  # one pass leaves QᵀQ - I near 1e-11 where columns hardly depend on each other
    for number in range(_PASSES):
        if Q.shape[1] == 0 or (number and not again):
            break
        G = gram(Q, Q)
        if number > 1 and float((G - torch.eye(len(G), dtype=G.dtype)).abs().max()) < floor / 2:
            break
        L, info = torch.linalg.cholesky_ex(G)
        apart = 0.0 if int(info) else float(L.diagonal().min())
        again = again or apart <= _CLEAR
        if apart > _DEPENDENT:
            change = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False).T
        else:
            values, vectors = torch.linalg.eigh(G)
            kept = values > max(floor * floor, 1e-15)
            change = vectors[:, kept] / values[kept].sqrt()
        Q = torch.mm(Q, change.to(Q.device))
    return Q.to(Y.dtype)


def well_conditioned(Y: Tensor, G: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of Y (m, b), given G = YᵀY in float64 on the CPU.

    One product in Y's dtype where columns hardly depend on each other, Cholesky leaving `_APART` of each; the steps of
    `orthonormal_columns` elsewhere.
    """
    change = change_of_basis(G) if Y.dtype == torch.float32 else None
    return orthonormal_columns(Y) if change is None else products.times(Y, change.to(Y.device, Y.dtype))


def change_of_basis(G: Tensor) -> Tensor | None:
    """Return R (b, b) that makes the columns of Y·R orthonormal, given G = YᵀY (b, b) in float64 on the CPU.

    R is upper triangular. None where columns depend on each other, Cholesky leaving less than `_APART` of one.
    """
    lengths = G.diagonal().clamp_min(0).sqrt()
    if not bool((lengths > 0).all()):
        return None
    L, info = torch.linalg.cholesky_ex(G / lengths / lengths[:, None])
    if int(info) or float(L.diagonal().min()) <= _APART:
        return None
    change: Tensor = torch.linalg.solve_triangular(L, lengths.reciprocal().diag(), upper=False).T
    return change


def extend(V: Tensor, W: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns of W add to the orthonormal columns of V.

    V is (n, a), W is (n, b); the result Q is (n, k), k ≤ b, with QᵀQ = I and VᵀQ = 0 to rounding. A column of W that
    lies in span(V) to within 16·eps of its own length adds nothing. Block Gram-Schmidt, done twice, and once more
    where W's columns depended on each other so much that orthonormalising them brought V back.
    """
    eps = torch.finfo(W.dtype).eps
    W = _unit_columns(W)
    W = _unit_columns(W - V @ (V.T @ W), 16 * eps)
    Q = orthonormal_columns(W - V @ (V.T @ W))
    overlap = V.T @ Q
    if overlap.numel() and float(overlap.abs().max()) > 4 * eps:
        Q = orthonormal_columns(Q - V @ overlap)
    return Q


def _unit_columns(X: Tensor, floor: float = 0.0) -> Tensor:
    lengths = torch.linalg.vector_norm(X, dim=0)
    kept = lengths > floor
    if not bool(kept.all()):
        X, lengths = X[:, kept], lengths[kept]
    return torch.div(X, lengths)
