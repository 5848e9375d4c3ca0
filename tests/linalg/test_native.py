"""The C code against float64, rounded once: every remainder of its blocks, ties, cancellation, what is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine.arithmetic.numpy import near_zero
from loratools.linalg import native

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C compiler")

Array = np.ndarray[Any, np.dtype[Any]]
INFINITY = 0x7F80


def stored(values: Array) -> Array:
    """Return numbers as bfloat16, rounded by torch, as the integers of their bits."""
    return torch.from_numpy(np.asarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def numbers(bits: Array) -> Array:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).double().numpy()


def run(
    W: Array, B: Array, A: Array, scale: Array, m: Array | None = None, rows: slice | None = None, measured: int = 0
) -> tuple[Array, native.Found, Array]:
    """Return what the C code makes of rows of a matrix, what it found, and the gains."""
    with np.errstate(over="ignore"):
        left = (B * scale).astype(np.float32)
        bound = float(np.linalg.norm(left, axis=1).max() * np.linalg.norm(A, axis=0).max()) * near_zero("BF16")
    terms = native.products(left, A, B, scale, m)
    rows = rows or slice(0, len(W))
    out, gains = np.zeros_like(W), np.zeros(len(left))
    found = native.add_products(
        W, out, terms, rows, np.empty(terms.memory, np.float32),
        bound=bound, gains=None if m is None else gains, measured=measured,
    )  # fmt: skip
    return out, found, gains


def dense(W: Array, B: Array, A: Array, scale: Array, m: Array | None) -> Array:
    """Return g∘(W + B·diag(scale)·A) in float64."""
    W = numbers(W) + (B.astype(np.float64) * scale) @ A.astype(np.float64)
    return W if m is None else W * (m / np.sqrt((W * W).sum(1)))[:, None]


def draw(rows: int, columns: int, rank: int, seed: int) -> tuple[Array, Array, Array, Array, Array]:
    """Return random W, B, A, scale and m."""
    random = np.random.default_rng(seed)
    W = stored(random.standard_normal((rows, columns)))
    B, A = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    return W, B, A, random.standard_normal(rank) * 0.3, random.uniform(0.5, 2, rows) * np.sqrt(columns)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 11), st.integers(1, 50), st.integers(1, 19), st.integers(0, 999), st.booleans())
def test_every_size_equals_float64_rounded_once(rows: int, columns: int, rank: int, seed: int, dora: bool) -> None:
    W, B, A, scale, m = draw(rows, columns, rank, seed)
    out, found, gains = run(W, B, A, scale, m if dora else None, measured=rows)
    wanted = dense(W, B, A, scale, m if dora else None)
    unit, terms = 2.0 ** (np.frexp(wanted)[1] - 8), np.abs(numbers(W)) + np.abs(B * scale) @ np.abs(A)
    terms *= gains[:, None] if dora else 1  # float32 sums err by the last digits of their terms
    assert (np.abs(numbers(out) - wanted) <= 0.5 * unit + 2.0**-22 * terms).all()
    assert found.largest == int((out & 0x7FFF).max())
    assert found.zero_row is None
    delta, kept = wanted - numbers(W), numbers(out) - numbers(W)
    assert found.total == pytest.approx(float((delta * delta).sum()), rel=1e-4, abs=1e-8)
    assert found.retained == pytest.approx(float((kept * delta).sum()), rel=1e-4, abs=1e-5)
    assert found.changed == np.count_nonzero(kept)
    if dora:
        whole = numbers(W) + (B.astype(np.float64) * scale) @ A.astype(np.float64)
        np.testing.assert_allclose(gains, m / np.linalg.norm(whole, axis=1), rtol=1e-5)


def test_a_rectangle_of_rows_apart_leaves_the_rest_alone() -> None:
    W, B, A, scale, m = draw(6, 20, 5, seed=1)
    whole = np.full((12, 30), 7, np.uint16)
    whole[1::2, 4:24] = W
    out = whole.copy()
    terms, gains = native.products((B * scale).astype(np.float32), A, B, scale, m), np.zeros(6)
    part = (slice(5, 10, 2), slice(4, 24))  # the last three rows but one
    sums = np.empty(terms.memory, np.float32)
    native.add_products(whole[part], out[part], terms, slice(2, 5), sums, gains=gains, bound=0.0)
    wanted, _, _ = run(W, B, A, scale, m)
    np.testing.assert_array_equal(out[part], wanted[2:5])
    out[part] = whole[part]
    np.testing.assert_array_equal(out, whole)
    assert gains[[0, 1, 5]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dora", [False, True])
def test_what_cancels_is_computed_in_float64(dora: bool) -> None:
    # ΔW is −W but for its last digits: the float32 sum is off by many units in the last place of what is left.
    W, B, A, scale, m = draw(8, 64, 6, seed=2)
    W = stored(-((B.astype(np.float64) * scale) @ A.astype(np.float64)))
    out, _, _ = run(W, B, A, scale, m if dora else None)
    wanted = dense(W, B, A, scale, m if dora else None)
    near = np.abs(wanted) < 1e-4 * np.abs(wanted).max() if dora else np.full(W.shape, True)
    np.testing.assert_allclose(numbers(out)[near], wanted[near], rtol=2**-8)
    float32 = numbers(W).astype(np.float32) + (B * scale).astype(np.float32) @ A
    assert (stored(float32) != stored(wanted.astype(np.float32))).any() or dora  # float32 alone would not do


def test_ties_go_to_even_and_subnormals_stay() -> None:
    W = stored(np.array([[1.0, 1.0078125, -1.0, -1.0078125, 1e-39, -1e-40, 0.0, -0.0]]))
    half = np.array([[2.0**-8, 2.0**-8, -(2.0**-8), -(2.0**-8), 1e-39, 0.0, 0.0, 0.0]], np.float32)
    out, _, _ = run(W, np.ones((1, 1), np.float32), half, np.ones(1))
    wanted = numbers(W) + half
    np.testing.assert_array_equal(out, stored(wanted.astype(np.float32)))
    assert numbers(out)[0, :4].tolist() == [1.0, 1.015625, -1.0, -1.015625]


def test_what_is_not_finite_shows_in_the_largest() -> None:
    W, B, A, scale, m = draw(5, 18, 3, seed=3)
    assert run(W, B, A, scale)[1].largest < INFINITY
    for bad in (INFINITY, 0xFF80, 0x7FC0, 0x7F81):
        damaged = W.copy()
        damaged[4, 17] = bad
        assert run(damaged, B, A, scale)[1].largest >= INFINITY
        assert run(damaged, B, A, scale, m)[1].largest >= INFINITY
    assert run(W, B, A, scale * 1e39)[1].largest >= INFINITY


def test_a_row_without_direction_is_found() -> None:
    W, B, A, scale, m = draw(7, 18, 3, seed=4)
    W[5], B[5] = 0, 0
    assert run(W, B, A, scale, m)[1].zero_row == 5
    assert run(W[4:], B, A, scale, m, slice(4, 7))[1].zero_row == 5


def test_arrays_that_do_not_fit_are_refused() -> None:
    W, B, A, scale, m = draw(4, 6, 2, seed=5)
    with pytest.raises(ValueError, match="rows laid out alike"):
        run(W[:, ::2], B, A[:, ::2], scale)
    with pytest.raises(ValueError, match="rows laid out alike"):
        run(W[:3], B, A, scale, rows=slice(0, 4))
    with pytest.raises(ValueError, match="are not rows of left"):
        run(W, B, A, scale, rows=slice(2, 6))
    for wrong in ((B[1:], B, scale, m), (B, B[:, :1], scale, m), (B, B, scale[1:], m), (B, B, scale, m[1:])):
        with pytest.raises(ValueError, match="left, factor, scale and magnitude have the shapes"):
            native.products(wrong[0], A, *wrong[1:])
    terms = native.products(B, A, B, scale, m)
    with pytest.raises(ValueError, match="gains go with a magnitude"):
        native.add_products(W, W.copy(), terms, slice(0, 4), np.empty(terms.memory, np.float32), bound=0.0)
    with pytest.raises(ValueError, match="sums take 64 numbers, not 6"):
        native.add_products(W, W.copy(), terms, slice(0, 4), np.empty(6, np.float32), gains=np.ones(4), bound=0.0)
