"""ΔW, its norms and the products of delta.c: NumPy's bytes of a difference, and one result at every width."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from loratools.linalg.native import delta

WIDTHS = delta.widths()
DTYPES = ("BF16", "F16", "F32")
SHAPES = [(1, 1), (7, 5), (64, 16), (33, 48), (100, 530), (70, 2100)]


def stored(dtype: str, count: int, seed: int) -> memoryview:
    """Return the bytes of numbers of every size that a dtype holds, of both signs, small ones and zeros among them."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-9, 4, count)
    numbers = (rng.standard_normal(count) * scale * (rng.random(count) > 0.1)).astype(np.float32)
    if dtype == "BF16":
        return memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    return memoryview(numbers.astype(np.float16 if dtype == "F16" else np.float32)).cast("B")


def wide(raw: memoryview, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, np.float16 if dtype == "F16" else np.float32).astype(np.float64)


@pytest.mark.parametrize("count", [1, 15, 16, 1000, 70_001])
@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)))
def test_a_difference_has_the_bytes_of_numpy_at_every_width(dtypes: tuple[str, str], count: int) -> None:
    before, after = (stored(dtype, count, seed) for seed, dtype in enumerate(dtypes))
    plain, low = np.empty(count, np.float32), np.empty(count, np.uint16)
    norms = delta.plain_difference(before, after, dtypes, plain, low)
    assert delta.plain_difference(before, after, dtypes, plain) == (*norms[:2], 0)
    for width in WIDTHS:
        out, bits = np.full(count, np.nan, np.float32), np.full(count, 7, np.uint16)
        assert delta.difference(before, after, dtypes, out, width=width) == (*norms[:2], 0)
        assert out.tobytes() == plain.tobytes()
        assert delta.difference(before, after, dtypes, out, bits, width=width) == norms
        assert (out.tobytes(), bits.tobytes()) == (plain.tobytes(), low.tobytes())
    assert norms[2] == pytest.approx(np.square(plain.astype(float) - wide(memoryview(low), "BF16")).sum(), rel=1e-9)
    W, new = (wide(raw, dtype) for raw, dtype in zip((before, after), dtypes, strict=True))
    np.testing.assert_array_equal(plain, (new - W).astype(np.float32))
    assert norms[:2] == pytest.approx((np.square(plain.astype(np.float64)).sum(), np.square(W).sum()), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 12, 31, 40])
def test_numbers_that_are_not_finite_make_norms_that_are_not(bad: float, place: int) -> None:
    before, after = np.ones(41, np.float32), np.zeros(41, np.float32)
    after[place] = bad
    for pair, finite in (((before, after), (False, True)), ((after, before), (False, False))):
        raw = [memoryview(numbers).cast("B") for numbers in pair]
        for width in [*WIDTHS, None]:
            out = np.empty(41, np.float32)
            found = delta.difference(*raw, ("F32", "F32"), out, width=width)
            assert tuple(map(math.isfinite, found[:2])) == finite


def test_pieces_of_another_length_are_refused() -> None:
    raw = memoryview(bytes(8))
    with pytest.raises(ValueError, match=r"8 and 8 bytes of .* are not 2 numbers each"):
        delta.difference(raw, raw, ("BF16", "F32"), np.empty(2, np.float32))
    with pytest.raises(ValueError, match="do not go together"):
        delta.times(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="do not go together"):
        delta.times(np.ones((4, 6), np.float32)[:, ::2], np.ones((3, 3), np.float32))
    with pytest.raises(ValueError, match="do not go together"):
        delta.across(np.ones((2, 3)), np.ones((2, 3)))
    assert not delta.differs("F64", "F32")


@pytest.mark.skipif(not WIDTHS, reason="the C code is not compiled here")
@pytest.mark.parametrize("k", [1, 8, 16, 31, 32, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64_and_the_same_at_every_width(shape: tuple[int, int], k: int) -> None:
    rng = np.random.default_rng(k)
    held = rng.standard_normal((shape[0], shape[1] + 3), np.float32)
    D = held[:, 1 : 1 + shape[1]]
    X, Y = rng.standard_normal((k, shape[1]), np.float32).T, rng.standard_normal((shape[0], k), np.float32)
    for call, right, exact in ((delta.times, X, D.astype(float) @ X), (delta.across, Y, D.T.astype(float) @ Y)):
        made = [call(D, right, width=width) for width in WIDTHS]
        assert len({one.tobytes() for one in made}) == 1
        np.testing.assert_allclose(made[0], exact, atol=6e-6 * math.sqrt(max(shape)))
    sums = [delta.gram(Y, D, width=width) for width in WIDTHS]
    assert len({one.tobytes() for one in sums}) == 1
    np.testing.assert_allclose(sums[0], Y.T.astype(float) @ D, atol=1e-13 * shape[0])


@pytest.mark.parametrize("k", [1, 16, 33, 50])
@pytest.mark.parametrize("shape", [*SHAPES, (53, 49), (301, 96), (13, 4700)])
def test_both_products_of_one_pass_have_the_bytes_of_two(shape: tuple[int, int], k: int) -> None:
    if not WIDTHS:
        pytest.skip("the C code is not compiled here")
    rng = np.random.default_rng(k)
    D = rng.standard_normal((shape[0], shape[1] + 3), dtype=np.float32)[:, : shape[1]]
    X = rng.standard_normal((k, shape[1]), dtype=np.float32).T
    for width in WIDTHS:
        Y, back = delta.both(D, X, width=width)
        np.testing.assert_array_equal(Y, delta.times(D, X))
        np.testing.assert_array_equal(back, delta.across(D, Y))
    exact = D.T.astype(float) @ (D.astype(float) @ X)
    np.testing.assert_allclose(back, exact, atol=2e-6 * np.abs(exact).max() * max(shape) ** 0.5)


@pytest.mark.skipif(not delta.multiplies_bf16(), reason="this processor does not multiply BF16")
@pytest.mark.parametrize("k", [1, 16, 32, 50])
@pytest.mark.parametrize("shape", [(2, 2), (7, 6), (64, 16), (33, 48), (130, 530), (70, 4200)])
def test_products_of_bf16_are_those_of_the_rounded_numbers(shape: tuple[int, int], k: int) -> None:
    sizes = ((shape[0], shape[1] + 4), (shape[1], k), (shape[0], k))
    held, X, Y = (stored_normal(size, seed) for seed, size in enumerate(sizes))
    D = rounded(held)[:, 2 : 2 + shape[1]]
    exact = wide(memoryview(np.ascontiguousarray(D)), "BF16").reshape(shape)
    X_low, Y_low = (wide(memoryview(rounded(x)), "BF16").reshape(x.shape) for x in (X, Y))
    atol = 6e-6 * math.sqrt(max(shape))
    np.testing.assert_allclose(delta.times(D, X), exact @ X_low, atol=atol)
    np.testing.assert_allclose(delta.across(D, np.asfortranarray(Y)), exact.T @ Y_low, atol=atol)


def stored_normal(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """Return the bits of numbers rounded to BF16, by torch."""
    torch = pytest.importorskip("torch")
    return torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_bf16_that_is_not_served_is_refused() -> None:
    numbers = np.ones((3, 3), np.float32)
    for D, X in ((np.ones((2, 3), np.uint16), numbers), (np.ones((3, 2), np.uint16), numbers[:2].astype(float))):
        with pytest.raises(ValueError, match="do not go together"):
            delta.times(D, X)


def test_products_of_nothing_are_zero() -> None:
    if not WIDTHS:
        pytest.skip("the C code is not compiled here")
    nothing = np.empty((0, 3), np.float32)
    assert delta.times(nothing, np.ones((3, 2), np.float32)).shape == (0, 2)
    np.testing.assert_array_equal(delta.across(nothing, np.empty((0, 2), np.float32)), np.zeros((3, 2)))
    np.testing.assert_array_equal(delta.both(nothing, np.ones((3, 2), np.float32))[1], np.zeros((3, 2)))
    np.testing.assert_array_equal(delta.times(np.empty((3, 0), np.float32), np.empty((0, 2), np.float32)), 0)
