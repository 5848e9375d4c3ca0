"""`eigen.c`: the eigenvalues of a small symmetric matrix and the leading eigenvectors, in float64; LAPACK elsewhere."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loratools.linalg.native import loaded

Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = Path(__file__).with_name("libeigen.so")
QUAD = 4  # as in eigen.c


class _Eigen(ctypes.Structure):
    """The same fields, in the same order, as `Eigen` in eigen.c, where they are explained."""

    _fields_ = (
        ("G", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("stride", "n", "count")),
        *((name, ctypes.c_void_p) for name in ("values", "vectors", "memory")),
        ("failed", ctypes.c_size_t),
    )


@cache
def _library() -> tuple[Any, int]:
    return loaded.load(LIBRARY, "eigen_width", {"eigen_size": _Eigen}, ["eigen"])


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return _library()[1] > 0


def leading(G: Array, count: int) -> tuple[Array, Array]:
    """Return all eigenvalues of a symmetric G (n, n), the largest first, and the vectors (n, count) of the largest.

    G is float64, of which the lower half counts; vectors are orthonormal to rounding. With a count of 0 values alone.
    """
    n, wide = len(G), -(-count // QUAD) * QUAD
    if G.dtype != np.float64 or (n > 1 and G.strides[1] != 8):
        raise ValueError(f"G {G.dtype} {G.shape} with steps {G.strides} is not rows of float64")
    library, serves = _library()
    if not serves or not n:
        return _by_lapack(G, count)
    room = np.empty(n + n * wide + n * (-(-n // QUAD) * QUAD + 8) + n * count)
    at = room.ctypes.data
    call = _Eigen(G.ctypes.data, G.strides[0] // 8, n, count, at, at + 8 * n, at + 8 * (n + n * wide))
    library.loratools_eigen(ctypes.byref(call), serves)
    if call.failed:
        return _by_lapack(G, count)
    return room[:n][::-1], room[n : n + n * wide].reshape(n, wide)[:, :count]


def _by_lapack(G: Array, count: int) -> tuple[Array, Array]:
    if not count:
        return np.linalg.eigvalsh(G)[::-1], np.empty((len(G), 0))
    theta, X = np.linalg.eigh(G)
    return theta[::-1], X[:, : -count - 1 : -1]
