"""Stored factors, arranged for C: every dtype, turned and in part, side by side; against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import native
from loratools.linalg.native import factors
from loratools.linalg.native.factors import Matrix, Memory, Sum

pytestmark = pytest.mark.skipif(not factors.available(), reason="installed without a C compiler")

Array = np.ndarray[Any, np.dtype[Any]]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(values: Array, dtype: str = "F32") -> Matrix:
    """Return an array as a stored matrix, rounded by torch."""
    raw = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[dtype]).flatten().view(torch.uint8).numpy().tobytes()
    piece = Memory().of("stored", len(raw))
    piece.view[:] = raw
    return Matrix.of(piece, dtype, values.shape)


def summed(products: Sequence[tuple[Array, Array, float]], magnitude: Array | None = None) -> Sum:
    """Return the sum of products (left, right, scale)."""
    rows, columns, rescaled = len(products[0][0]), products[0][1].shape[1], magnitude is not None
    rank, scratch = sum(len(right) for _, right, _ in products), Memory()
    room = Memory().of("sum", Sum.nbytes(rows, columns, rank, rescaled=rescaled))
    total = Sum(rows, columns, rank, room, rescaled=rescaled)
    assert all(total.add(stored(left), stored(right), scale, scratch) for left, right, scale in products)
    assert magnitude is None or total.rescale(stored(magnitude[:, None].astype(np.float32)), scratch)
    return total


def held(total: Sum, name: str) -> Array:
    """Return what C has under a name, panels as a matrix (rank, columns rounded up)."""
    panels = -(-total.columns // native.LANES)
    counts = {"scale": total.rank, "magnitude": total.rows, "right": total.rank * panels * native.LANES}
    kind = ctypes.c_double if name in ("scale", "magnitude") else ctypes.c_float
    count = counts.get(name, total.rows * total.rank)
    array: Array = np.array((kind * count).from_address(total.pointers()[name]))
    if name == "right":
        return array.reshape(panels, total.rank, native.LANES).transpose(1, 0, 2).reshape(total.rank, -1)
    return array if name in counts else array.reshape(total.rows, total.rank)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(TORCH)), st.integers(1, 40), st.integers(1, 100), st.integers(1, 20), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_factors_are_side_by_side_in_float32(
    dtype: str, rows: int, columns: int, rank: int, turned: bool, seed: int
) -> None:
    random, scratch = np.random.default_rng(seed), Memory()
    room = Memory().of("sum", Sum.nbytes(rows, columns, 2 * rank, rescaled=False))
    total = Sum(rows, columns, 2 * rank, room, rescaled=False)
    lefts, rights = [], []
    for scale in (0.7, -2.0):
        left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
        if turned:
            first, second = stored(left.T, dtype).T, stored(right.T, dtype).T
        else:
            first, second = stored(left, dtype), stored(right, dtype)
        assert total.add(first, second, scale, scratch)
        lefts.append(torch.from_numpy(left).to(TORCH[dtype]).float().numpy())
        rights.append(torch.from_numpy(right).to(TORCH[dtype]).float().numpy())
    factor, right, scale = np.concatenate(lefts, 1), np.concatenate(rights), np.repeat([0.7, -2.0], rank)
    np.testing.assert_array_equal(held(total, "factor"), factor)
    np.testing.assert_array_equal(held(total, "scale"), scale)
    np.testing.assert_array_equal(held(total, "left"), (factor * scale).astype(np.float32))
    panels = held(total, "right")
    np.testing.assert_array_equal(panels[:, :columns], right)
    assert not panels[:, columns:].any()
    norms = np.linalg.norm(factor * scale, axis=1).max(), np.linalg.norm(right.astype(float), axis=0).max()
    assert total.bound() == pytest.approx(norms[0] * norms[1], rel=1e-5)
    assert all(total.pointers()[name] % 64 == 0 for name in ("factor", "left", "right"))


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_rows_of_a_factor_and_of_magnitudes(dtype: str) -> None:
    random = np.random.default_rng(1)
    left, right, m = random.standard_normal((9, 3)), random.standard_normal((3, 5)), random.uniform(1, 2, 9)
    total = Sum(4, 5, 3, Memory().of("sum", Sum.nbytes(4, 5, 3, rescaled=True)), rescaled=True)
    assert total.add(stored(left, dtype).rows(slice(2, 6)), stored(right, dtype), 1.0, Memory())
    assert total.rescale(stored(m[:, None], dtype).rows(slice(2, 6)), Memory())
    np.testing.assert_array_equal(held(total, "factor"), torch.from_numpy(left[2:6]).to(TORCH[dtype]).float().numpy())
    np.testing.assert_array_equal(held(total, "magnitude"), torch.from_numpy(m[2:6]).to(TORCH[dtype]).double().numpy())


@pytest.mark.parametrize("dtype", sorted(TORCH))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(dtype: str, bad: float) -> None:
    left, right, m = np.ones((5, 2)), np.ones((2, 40)), np.ones((5, 1))
    total = Sum(5, 40, 4, Memory().of("sum", Sum.nbytes(5, 40, 4, rescaled=True)), rescaled=True)
    right[1, 37] = bad
    assert not total.add(stored(left, dtype), stored(right, dtype), 1.0, Memory())
    left[4, 1] = bad
    assert not total.add(stored(left, dtype), stored(np.ones((2, 40)), dtype), 1.0, Memory())
    assert total.rescale(stored(m, dtype), Memory())
    m[4] = bad
    assert not total.rescale(stored(m, dtype), Memory())


def test_matrices_that_do_not_fit_are_refused() -> None:
    total = Sum(5, 40, 4, Memory().of("sum", Sum.nbytes(5, 40, 4, rescaled=True)), rescaled=True)
    for left, right in (((4, 4), (4, 40)), ((5, 4), (4, 41)), ((5, 3), (4, 40)), ((5, 5), (5, 40))):
        with pytest.raises(ValueError, match="do not fit into"):
            total.add(stored(np.ones(left)), stored(np.ones(right)), 1.0, Memory())
    with pytest.raises(ValueError, match="are not magnitudes of 5 rows"):
        total.rescale(stored(np.ones((4, 1))), Memory())


def test_memory_is_used_again_and_grows() -> None:
    memory = Memory()
    first = memory.of("a", 1000)
    assert (memory.of("a", 10).address, len(memory.of("a", 10).view)) == (first.address, 10)
    assert memory.of("b", 1000).address != first.address
    grown = memory.of("a", 100_000)
    grown.view[:] = bytes(100_000)
    assert memory.of("a", 1000).address == grown.address
    assert all(piece.address % 64 == 0 for piece in (first, grown))
