"""The residual in C: predictions and codes are those of NumPy's formulas, to the bit, at every width of vectors."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loratools.engine.residual import codes
from loratools.errors import BadFile
from loratools.linalg.native import residual, steps
from loratools.storage.codecs.floats import narrow, unsigned, widen

pytestmark = pytest.mark.skipif(not residual.available(), reason="installed without a C compiler")
Array = np.ndarray[Any, np.dtype[Any]]
WIDTHS = residual.widths()
CASTS = [*((dtype, dtype) for dtype in residual.DTYPES), ("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")]


def numbers(dtype: str, count: int, seed: int) -> Array:
    """Return bits of finite numbers of every size, zeros of both signs and subnormal ones among them."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal(count) * 2.0 ** random.integers(-30, 10, count)).astype(np.float32)
    values[: min(4, count)] = [0.0, -0.0, 1e-41, -6e-8][:count]
    return narrow(values, dtype)


def fixed(rows: int, columns: int, rank: int, seed: int) -> tuple[Array, Array]:
    """Return factors whose products and sums are exact in float64."""
    random = np.random.default_rng(seed)
    left = random.integers(-(2**20), 2**20, (rows, rank)) * 2.0 ** random.integers(-30, -18, (rows, 1))
    right = random.integers(-(2**20), 2**20, (rank, columns)) * 2.0 ** random.integers(-20, -10, (1, columns))
    return left, right


def taken_back(
    W: Array, left: Array, right: Array, by_row: Array | None = None, by_column: Array | None = None
) -> None:
    """Do in NumPy what a product stands for, on float32, in place."""
    if by_row is not None:
        W /= by_row[:, None]
    if by_column is not None:
        W /= by_column
    W -= (left @ right).astype(np.float32)


def block(coded: residual.Coded | None, dtype: str, count: int) -> bytes:
    assert coded is not None
    high = coded.high.astype(unsigned(dtype))
    whole = codes.joined(coded.ranks, coded.at, high, count)
    if coded.raw is not None:
        assert whole == codes.framed(coded.form, len(coded.at), coded.ranks, coded.raw)
    return whole


def read(coder: residual.Coder, made: bytes, after: Array, dtype: str, start: int, width: int) -> Array | None:
    size = np.dtype(unsigned(dtype)).itemsize
    form, count, ranks, raw = codes.unframed(memoryview(made), len(after), size)
    packed, exceptions = np.frombuffer(ranks, np.uint8), np.frombuffer(raw, np.uint8)
    return coder.decode(after, packed, form, count, exceptions, start, width=width)


def check(
    coder: residual.Coder, base: Array, after: Array, prediction: Array, dtypes: tuple[str, str], width: int,
    start: int = 0,
) -> None:  # fmt: skip
    """Hold both ways of coding against each other, and read what was written."""
    source, dtype = dtypes
    made = block(coder.encode(base, after, start, width=width), dtype, len(base))
    assert made == codes.encode(base, after, prediction.reshape(-1), dtype, source)
    found = read(coder, made, after, dtype, start, width)
    assert found is not None
    assert found.tobytes() == base.tobytes()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", CASTS)
@pytest.mark.parametrize("gains", ["none", "by_row", "by_column"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(9, 64, 16), (1, 5, 3), (25, 33, 1), (16, 16, 0), (3, 130, 70), (17, 2, 2), (4, 0, 1)]
)
def test_a_tile_is_coded_and_read_as_numpy_does(
    rows: int, columns: int, rank: int, gains: str, dtypes: tuple[str, str], width: int
) -> None:
    """Of changes of every size beside numbers of every size; with g for rows, for columns, or none."""
    source, dtype = dtypes
    random = np.random.default_rng(rows)
    left, right = fixed(rows, columns, rank, rows)
    g = random.uniform(0.3, 3, rows if gains == "by_row" else columns).astype(np.float32)
    more: dict[str, Any] = {} if gains == "none" else {gains: g}
    base = numbers(dtype, rows * columns, 1)
    changed = (widen(base, dtype, np.float32).reshape(rows, columns) + left @ right).astype(np.float32)
    if gains != "none":
        changed *= g[:, None] if gains == "by_row" else g
    after = narrow(changed, source).reshape(-1)
    prediction = widen(after, source, np.float32).reshape(rows, columns)
    taken_back(prediction, left, right, **more)
    product = steps.product((0, rows, 1), (0, columns), left, right, **more)
    check(residual.Coder([product], columns, source, dtype), base, after, prediction, dtypes, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("size", [2.0**-40, 2.0**-23, 2.0**-10, 1.0, 2.0**12])
def test_what_float32_leaves_open_is_summed_in_float64(size: float, dtype: str, width: int) -> None:
    """Predictions lie on the middle of two floats, and so little off that float32 does not tell; sums cancel."""
    random = np.random.default_rng(3)
    rows, columns, rank = 40, 96, 16
    after = numbers(dtype, rows * columns, 4).reshape(rows, columns)
    exact = widen(after, dtype, np.float32).astype(np.float64)
    step = np.ldexp(1.0, np.frexp(np.abs(exact).max(1, keepdims=True))[1] - 12)
    left = np.concatenate([random.integers(1, 2**20, (rows, 14)) * 2.0**-20, np.ones((rows, 2))], 1) * step * size
    right = random.integers(-(2**8), 2**8, (rank, columns)) * 1.0
    right[7:14], left[:, 7:14] = -right[:7], left[:, :7]  # nothing is left but the last two
    right[14] = random.integers(-4, 5, columns)
    right[15] = random.integers(-1, 2, columns) * 2.0**-22
    prediction = exact.astype(np.float32)
    taken_back(prediction, left, right)
    base = narrow(prediction, dtype).reshape(-1)
    base[::5] ^= 1
    product = steps.product((0, rows, 1), (0, columns), left, right)
    coder = residual.Coder([product], columns, dtype, dtype)
    check(coder, base, after.reshape(-1), prediction, (dtype, dtype), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize(
    ("W", "products"),
    [
        (1.0, [-(2.0**-24) * (1 + 2.0**-23), 7 * 2.0**-51, 7 * 2.0**-51]),  # the difference is rounded, too
        (-1.0, [2.0**-24 * (1 + 2.0**-23), -7 * 2.0**-51, -7 * 2.0**-51]),
        (2.0**-130, [2.0**-134, 13 * 2.0**-154, 13 * 2.0**-154]),  # below the smallest normal float
    ],
)
def test_a_sum_that_float32_rounds_to_the_other_side(W: float, products: list[float], rows: int, width: int) -> None:
    """Summed one after another in float32 they lie beside the middle of two floats, or of float32 itself."""
    columns = 70
    size = 2.0 ** (np.frexp(products[0])[1] // 2)  # norms of either are near the root of the product
    left, right = np.full((rows, 3), size), np.repeat(np.array(products)[:, None] / size, columns, 1)
    after = narrow(np.full(rows * columns, W, np.float32), "BF16")
    prediction = widen(after, "BF16", np.float32).reshape(rows, columns)
    taken_back(prediction, left, right)
    base = narrow(prediction, "BF16").reshape(-1)
    base[1::2] += 1
    product = steps.product((0, rows, 1), (0, columns), left, right)
    check(residual.Coder([product], columns, "BF16", "BF16"), base, after, prediction, ("BF16", "BF16"), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", CASTS)
def test_products_lie_on_rectangles_rows_apart_and_over_each_other(dtypes: tuple[str, str], width: int) -> None:
    """A tile may begin anywhere; what was added last is taken back first."""
    source, dtype = dtypes
    rows, columns = 60, 75
    places = [((3, 20, 1), (0, 75)), ((20, 41, 1), (0, 75)), ((42, 60, 2), (0, 75)), ((43, 60, 2), (0, 75)),
              ((9, 30, 1), (10, 33)), ((0, 60, 3), (74, 75))]  # fmt: skip
    base, after = numbers(dtype, rows * columns, 1), numbers(source, rows * columns, 2)
    for chosen in (places[:2], places[2:4], places):
        products, prediction = [], widen(after, source, np.float32).reshape(rows, columns)
        for seed, (down, across) in reversed([*enumerate(chosen)]):
            left, right = fixed(len(range(*down)), across[1] - across[0], 5, seed)
            g = np.random.default_rng(seed).uniform(0.5, 2, len(left)).astype(np.float32) if seed % 2 else None
            taken_back(prediction[slice(*down), slice(*across)], left, right, g)
            products.insert(0, steps.product(down, across, left, right, by_row=g))
        coder = residual.Coder(products, columns, source, dtype)
        for start, stop in ((0, 60), (5, 44), (19, 21), (59, 60)):
            tile = slice(start * columns, stop * columns)
            check(coder, base[tile], after[tile], prediction[start:stop], dtypes, width, start)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", CASTS)
@pytest.mark.parametrize("count", [5000, 1003, 64, 7, 0])
def test_any_base_is_coded_from_any_result(count: int, dtypes: tuple[str, str], width: int) -> None:
    """The base may be anything, infinities and NaN too; only the prediction must be finite."""
    source, dtype = dtypes
    random = np.random.default_rng(5)
    base = random.integers(0, np.iinfo(unsigned(dtype)).max, count, unsigned(dtype), endpoint=True)
    after = numbers(source, count, 6)
    near = narrow(widen(after, source, np.float32) * np.float32(1.003), dtype)
    base[::2] = near[::2]
    coder = residual.Coder([], 1, source, dtype)
    check(coder, base, after, widen(after, source, np.float32), dtypes, width)
    check(coder, near, after, widen(after, source, np.float32), dtypes, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
@pytest.mark.parametrize("binades", [1, 3, 12, 40])
def test_bits_of_many_binades_are_packed(binades: int, dtype: str, width: int) -> None:
    """Where W' lies far above W, as many bits are open as a mantissa has, of every number."""
    random = np.random.default_rng(binades)
    rows, columns = 24, 200
    W = random.standard_normal((rows, columns)).astype(np.float32)
    left = np.full((rows, 1), 2.0 ** min(binades, 13 if dtype == "F16" else 40))
    right = np.ones((1, columns))
    base = narrow(W, dtype).reshape(-1)
    after = narrow((widen(base, dtype, np.float32).reshape(rows, columns) + left @ right).astype(np.float32), dtype)
    prediction = widen(after, dtype, np.float32).reshape(rows, columns)
    taken_back(prediction, left, right)
    product = steps.product((0, rows, 1), (0, columns), left, right)
    check(residual.Coder([product], columns, dtype, dtype), base, after.reshape(-1), prediction, (dtype, dtype), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
def test_predictions_that_are_not_finite_are_left_to_numpy(dtype: str, width: int) -> None:
    base = numbers(dtype, 40, 0)
    left, right = fixed(4, 10, 3, 0)
    for products in ([], [steps.product((0, 4, 1), (0, 10), left, right)]):
        coder = residual.Coder(products, 10, dtype, dtype)
        assert coder.encode(base, base, width=width) is not None
        for bad in (np.nan, np.inf, -np.inf):
            after = base.copy()
            after[37] = narrow(np.array([bad], np.float32), dtype)[0]
            assert coder.encode(base, after, width=width) is None
            assert coder.decode(after, np.zeros(0, np.uint8), 0, 0, np.zeros(0, np.uint8), width=width) is None


@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_that_does_not_fit_its_tile_is_left_to_numpy(width: int) -> None:
    """Too few or too many candidates, and places beyond the tile; of two exceptions in one place the last counts."""
    coder, after, nothing = residual.Coder([], 8, "BF16", "BF16"), numbers("BF16", 64, 1), np.zeros(0, np.uint8)

    def sparse(*pairs: tuple[int, int]) -> Array:
        gaps, high = np.array(pairs, np.uint32).T.copy()
        return np.concatenate([gaps.view(np.uint8), (high & 255).astype(np.uint8), (high >> 8).astype(np.uint8)])

    assert coder.decode(after, np.ones(1, np.uint8), 0, 0, nothing, width=width) is None
    assert coder.decode(after, np.zeros(1 << 20, np.uint8), 0, 0, nothing, width=width) is None
    assert coder.decode(after, nothing, 0, 1, sparse((64, 1)), width=width) is None
    assert coder.decode(after, nothing, 0, 2, sparse((60, 1), (0xFFFFFFFF, 1)), width=width) is None
    found = coder.decode(after, nothing, 0, 3, sparse((9, 7), (0, 0x102), (54, 1)), width=width)
    made = codes.framed(codes.SPARSE, 3, b"", sparse((9, 7), (0, 0x102), (54, 1)).tobytes())
    wanted = codes.decode(memoryview(made), after, widen(after, "BF16", np.float32), "BF16", "BF16")
    assert found is not None
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
@pytest.mark.parametrize(
    ("count", "form"), [(0, 2), (1, 2), (1024, 2), (1025, 0), (2499, 0), (2500, 1), (40_000, 1)]
)  # fmt: skip
def test_exceptions_are_listed_by_how_many_they_are(count: int, form: int, dtype: str, width: int) -> None:
    """Of 40,000 numbers: as they are, by place and deflated, and for every number."""
    random = np.random.default_rng(count)
    after = numbers(dtype, 40_000, 2)
    base = after.copy()
    at = np.sort(random.choice(40_000, count, replace=False))
    base[at] ^= random.integers(1, 2**10, count).astype(base.dtype)
    coder, prediction = residual.Coder([], 1, dtype, dtype), widen(after, dtype, np.float32)
    coded = coder.encode(base, after, width=width)
    assert coded is not None
    assert (coded.form, coded.at.tolist()) == (form, at.tolist())
    check(coder, base, after, prediction, (dtype, dtype), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
def test_blocks_of_several_tiles_are_those_of_each(dtype: str, width: int) -> None:
    """They end before a tile whose prediction is not finite, and before one with exceptions that are to be deflated."""
    rows, columns, height = 60, 700, 12
    random = np.random.default_rng(7)
    left, right = random.integers(-9, 9, (rows, 3)) * 2.0**-12, random.integers(-9, 9, (3, columns)) * 2.0**-4
    base = narrow(random.uniform(0.5, 4, rows * columns).astype(np.float32), dtype)
    changed = widen(base, dtype, np.float32).reshape(rows, columns) + left @ right
    after = narrow(changed.astype(np.float32), dtype).reshape(-1)
    coder = residual.Coder([steps.product((0, rows, 1), (0, columns), left, right)], columns, dtype, dtype)
    size = height * columns

    def blocks(base: Array, after: Array, tiles: range) -> bytes:
        made = b""
        for n in tiles:
            tile = slice(n * size, (n + 1) * size)
            one = block(coder.encode(base[tile], after[tile], n * height, width=width), dtype, size)
            made += len(one).to_bytes(4, "little") + one
        return made

    assert coder.blocks(base, after, 0, height, width=width) == (blocks(base, after, range(5)), 5)
    bad = after.copy()
    bad[3 * size + 5] = narrow(np.array([np.inf], np.float32), dtype)[0]
    assert coder.blocks(base, bad, 0, height, width=width) == (blocks(base, after, range(3)), 3)
    other = base.copy()
    other[4 * size : 4 * size + 1200] ^= 1 << 9
    many = coder.encode(other[4 * size :], after[4 * size :], 4 * height, width=width)
    assert many is not None
    assert many.form != residual.LISTED
    assert coder.blocks(other[size:], after[size:], height, height, width=width) == (
        blocks(base, after, range(1, 4)),
        3,
    )
    assert coder.blocks(other[4 * size :], after[4 * size :], 4 * height, height, width=width) == (b"", 0)
    for W, W2, tall in (
        (base, after[:-1], height),
        (base[:-1], after[:-1], height),
        (base, after, 7),
        (base, after, 0),
    ):
        with pytest.raises(ValueError, match="whole tiles"):
            coder.blocks(W, W2, 0, tall)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("raw", "count"),
    [
        ("", 1), ("05", 1), ("8005", 1), ("0580", 1), ("050106", 1), ("40 01", 1), ("3f 01 01 01", 2),
        ("00 808004", 1), ("05 ffffffff10", 1), ("ffffffffff7f 01", 1), ("01 808080808001", 1), ("05 01 05 01", 3),
    ],
)  # fmt: skip
def test_a_list_of_exceptions_that_no_one_writes_is_refused(raw: str, count: int, width: int) -> None:
    """Truncated, too long, of numbers with more bits than they may have, and of places beyond 64 numbers."""
    after, listed = numbers("BF16", 64, 1), bytes.fromhex(raw)
    coder, nothing = residual.Coder([], 8, "BF16", "BF16"), np.zeros(0, np.uint8)
    given = np.frombuffer(listed, np.uint8)
    assert coder.decode(after, nothing, residual.LISTED, count, given, width=width) is None
    made = memoryview(codes.framed(codes.LISTED, count, b"", listed))
    with pytest.raises(BadFile, match=r"is damaged|beyond its tile"):
        codes.decode(made, after, widen(after, "BF16", np.float32), "BF16", "BF16")


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_of_a_list_are_leb128(width: int) -> None:
    """300 = 0b10_0101100 takes two bytes; of two exceptions in one place the last counts."""
    after, listed = numbers("BF16", 500, 1), bytes.fromhex("ac02 8101 00 03 01 ffff03")
    coder, given = residual.Coder([], 500, "BF16", "BF16"), np.frombuffer(listed, np.uint8)
    found = coder.decode(after, np.zeros(0, np.uint8), residual.LISTED, 3, given, width=width)
    made = memoryview(codes.framed(codes.LISTED, 3, b"", listed))
    wanted = codes.decode(made, after, widen(after, "BF16", np.float32), "BF16", "BF16")
    assert found is not None
    np.testing.assert_array_equal(found, wanted)
    assert np.flatnonzero(wanted != after).tolist() == [300, 301]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(7, 40), (16, 1), (1, 33), (3, 0), (0, 3)])
def test_factors_in_fixed_point_are_what_exact_arithmetic_gives(shape: tuple[int, int], axis: int, width: int) -> None:
    """Multiples of 2^-20 of the power of two above the largest of a row or column, halves to the even one."""
    random = np.random.default_rng(8)
    factor = random.standard_normal(shape) * 2.0 ** random.integers(-40, 40, shape)
    factor[:1] = -0.0
    factor[1:2] = 2.0 ** random.integers(-3, 3, factor[1:2].shape) * 1.5
    given = factor.copy()
    assert steps.fix(given, 20, axis, width=width)
    for line, old in zip(given if axis else given.T, factor if axis else factor.T, strict=True):
        largest = max((abs(Fraction(number)) for number in old), default=Fraction(0))
        above = Fraction(1)
        while above <= largest:
            above *= 2
        while largest and above / 2 > largest:
            above /= 2
        step = above / 2**20
        assert [Fraction(number) for number in line] == [round(Fraction(number) / step) * step for number in old]


@pytest.mark.parametrize(
    "factor",
    [np.full((2, 3), 1e308), np.full((2, 3), 5e-324), np.full((2, 3), 0.3, np.float32), np.full((3, 2), 0.3).T],
)
def test_what_cannot_be_fixed_in_c_is_left_as_it_is(factor: Array) -> None:
    """Powers of two that are no float64, other dtypes and orders."""
    before = factor.copy()
    assert not steps.fix(factor, 20, 1)
    np.testing.assert_array_equal(factor, before)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 70, 3), (1, 32, 16), (40, 1, 1), (3, 33, 0)])
@pytest.mark.parametrize("held", [True, False])
def test_factors_are_laid_out_with_bounds_of_what_float32_loses(rows: int, columns: int, rank: int, held: bool) -> None:
    """No sum in float32, in the order of the rank, is farther off than the bound of its row and panel."""
    random = np.random.default_rng(rank)
    left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
    if held:
        left, right = (np.rint(factor * 2**20) / 2**20 for factor in (left, right))
    made = steps.product((0, rows, 1), (0, columns), left, right)
    _, panels, near_left, near_panels, row_error, panel_error, *_ = made.arrays
    assert made.call.held == (held or rank == 0)
    assert panels is not None
    assert near_left is not None
    assert near_panels is not None
    assert row_error is not None
    assert panel_error is not None
    count = -(-columns // steps.LANES)
    padded = np.zeros((rank, count * steps.LANES))
    padded[:, :columns] = right
    np.testing.assert_array_equal(panels, padded.reshape(rank, count, steps.LANES).transpose(1, 0, 2))
    np.testing.assert_array_equal(near_panels, panels.astype(np.float32))
    np.testing.assert_array_equal(near_left, left.astype(np.float32))
    sums = np.zeros((count, rows, steps.LANES), np.float32)
    for k in range(rank):
        sums += near_left[:, k, None] * near_panels[:, None, k]
    assert (np.abs(sums - left @ panels) <= row_error[:, None] * panel_error[:, None, None]).all()
    norms = np.linalg.norm(left, axis=1), np.sqrt(np.square(panels).sum(1)).max(1, initial=0)
    roundings = rank + (2 if made.call.held else 4)
    np.testing.assert_allclose(row_error, norms[0] * roundings * 2.0**-24 * 1.01, rtol=1e-6)
    np.testing.assert_allclose(panel_error, norms[1] * 1.01, rtol=1e-6)
    far = steps.product((0, rows, 1), (0, columns), left * 2.0**21, right)
    assert (far.call.near_left is None) == (rank > 0 and float(np.abs(norms[0]).max()) * 2.0**21 >= 2.0**20)


def test_arrays_that_do_not_go_together_are_refused() -> None:
    left, right = np.zeros((4, 3)), np.zeros((3, 32))
    whole: dict[str, Any] = {"rows": (0, 4, 1), "columns": (0, 32), "left": left, "right": right}
    for wrong in (
        {"left": left[:3]}, {"left": left[:, :2]}, {"right": right[:, 1:]}, {"by_row": np.ones(3, np.float32)},
        {"by_column": np.ones(32)}, {"rows": (0, 4, 2)}, {"columns": (-1, 31)}, {"rows": (4, 0, -1)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit|no rectangle"):
            steps.product(**{**whole, **wrong})
    product = steps.product(**whole)
    with pytest.raises(ValueError, match="beyond"):
        residual.Coder([product], 31, "BF16", "BF16")
    coder, tile = residual.Coder([product], 32, "BF16", "F32"), np.zeros(64, np.uint16)
    for base, after in ((tile, tile), (tile.astype(np.uint32)[:32], tile), (np.zeros(33, np.uint32), tile[:33])):
        with pytest.raises(ValueError, match=r"not those of the tensors|not whole rows"):
            coder.encode(base, after)
    for form, count, raw in ((0, 1, 5), (0, 65, 65 * 8), (1, 3, 12)):
        with pytest.raises(ValueError, match="exceptions"):
            coder.decode(tile, tile[:0].view(np.uint8), form, count, np.zeros(raw, np.uint8))
