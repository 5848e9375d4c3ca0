"""The proof in C: sums, products and comparisons are those of plain formulas in NumPy, and one at every width."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.linalg.native import proof
from loratools.storage.codecs.floats import narrow, unsigned, widen

pytestmark = pytest.mark.skipif(not proof.available(), reason="installed without a C compiler")
Array = np.ndarray[Any, np.dtype[Any]]
PAIRS = [(before, after) for before in proof.DTYPES for after in proof.DTYPES]
SHAPES = [(9, 64), (1, 5), (33, 300), (16, 1), (70, 521)]


def pair(shape: tuple[int, int], dtypes: tuple[str, str], seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return the bits of W and W', most of them different, and their numbers in float64."""
    random = np.random.default_rng(seed)
    W = random.standard_normal(shape).astype(np.float32)
    result = W + np.float32(0.01) * random.standard_normal(shape).astype(np.float32) * (random.random(shape) < 0.7)
    before, after = narrow(W, dtypes[0]), narrow(result.astype(np.float32), dtypes[1])
    return before, after, widen(before, dtypes[0], np.float64), widen(after, dtypes[1], np.float64)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_products_are_those_of_float64(shape: tuple[int, int], dtypes: tuple[str, str], across: bool) -> None:
    before, after, W, result = pair(shape, dtypes)
    delta = (result - W).T if across else result - W
    X = np.random.default_rng(1).standard_normal((delta.shape[1], proof.PROBES))
    start = np.random.default_rng(2).standard_normal((len(delta), proof.PROBES))
    made = []
    for width in proof.widths():
        Y = start.copy()
        squares, differing = proof.measure(before, after, dtypes, X, Y, across=across, width=width)
        assert squares == pytest.approx(float((result**2).sum()), rel=1e-14)
        assert differing == int((result != W).sum())
        np.testing.assert_allclose(Y, start + delta @ X, rtol=0, atol=1e-13)
        assert proof.measure(before, after, dtypes, across=across, width=width) == (squares, differing)
        made.append((squares, Y.tobytes()))
    assert len(set(made)) == 1


def test_products_of_whole_numbers_are_exact() -> None:
    """Every element and every probe counts once: sums of whole numbers have no rounding to hide behind."""
    random = np.random.default_rng(3)
    W, result = (random.integers(-99, 99, (77, 301)).astype(np.float32) for _ in range(2))
    X = random.integers(-9, 9, (301, proof.PROBES)).astype(np.float64)
    for width in proof.widths():
        Y, bits = np.zeros((77, proof.PROBES)), (narrow(W, "F32"), narrow(result, "F32"))
        squares, differing = proof.measure(*bits, ("F32", "F32"), X, Y, width=width)
        np.testing.assert_array_equal(Y, (result - W).astype(np.float64) @ X)
        assert (squares, differing) == (float((result.astype(np.float64) ** 2).sum()), int((result != W).sum()))
        down = np.zeros((301, proof.PROBES))
        proof.measure(*bits, ("F32", "F32"), X[:77].copy(), down, across=True, width=width)
        np.testing.assert_array_equal(down, (result - W).astype(np.float64).T @ X[:77])


@pytest.mark.parametrize("width", proof.widths())
@pytest.mark.parametrize("at", [0, 15, 16, 300])
def test_the_smallest_difference_counts(at: int, width: int) -> None:
    """One subnormal bit in one element; and NaN, which is another number than itself."""
    bits = np.zeros((3, 301), np.uint32)
    moved = bits.copy()
    moved[2, at] = 1
    assert proof.measure(bits, bits, ("F32", "F32"), width=width) == (0.0, 0)
    assert proof.measure(bits, moved, ("F32", "F32"), width=width) == (2.0**-298, 1)
    nan = np.full((2, 5), 0x7FC0, np.uint16)
    assert proof.measure(nan, nan, ("BF16", "BF16"), width=width)[1] == 10


@pytest.mark.parametrize("width", proof.widths())
def test_rows_and_columns_of_a_larger_tile(width: int) -> None:
    before, after, W, result = pair((20, 90), ("BF16", "F32"))
    X = np.random.default_rng(1).standard_normal((40, proof.PROBES))
    inside = (slice(3, 19, 5), slice(11, 51))
    Y = np.zeros((4, proof.PROBES))
    assert proof.serves(before[inside], after[inside], ("BF16", "F32"))
    squares, _ = proof.measure(before[inside], after[inside], ("BF16", "F32"), X, Y, width=width)
    assert squares == pytest.approx(float((result[inside] ** 2).sum()), rel=1e-14)
    np.testing.assert_allclose(Y, (result - W)[inside] @ X, atol=1e-13)
    assert not proof.serves(before[:, ::2], after[:, ::2], ("BF16", "F32"))
    assert not proof.serves(before, after, ("F64", "F32"))


def judged(W: Array, result: Array, change: Array, dtype: str, rule: proof.Rule) -> proof.Found:
    """Compare element by element in fractions, which do not round."""
    wrong = far = 0
    for w, y, d in zip(W.flat, result.flat, change.flat, strict=True):
        right = float(widen(narrow(np.array([w + d], np.float64).astype(np.float32), dtype), dtype, np.float64)[0])
        off, exact = abs(right - y), w + d
        if rule.ties:
            middle = abs(Fraction(exact) - (Fraction(right) + Fraction(y)) / 2)
            fits = off == 0 or middle <= rule.unit * (abs(w) + rule.reach)
        else:
            largest = max(abs(right), abs(y), abs(d) if rule.of_change else 0.0)
            least = max(rule.smallest, rule.terms * (float(np.abs(W).max()) + rule.reach))
            fits = off <= max(rule.unit * largest, least)
        wrong, far = wrong + (off != 0), far + (not fits)
    rounded = widen(narrow((W + change).astype(np.float32), dtype), dtype, np.float64)
    sums = [float((a * b).sum()) for a, b in ((result - W, change), (rounded - W, change), (change, change))]
    return proof.Found(wrong, far, *sums)


RULES = [
    proof.Rule(True, 0.03, 8 * 2.0**-24),
    proof.Rule(False, 0.03, 2.0**-7, of_change=True, smallest=2.0**-133),
    proof.Rule(False, 0.03, 2.0**-23, smallest=2.0**-149, terms=8 * 2.0**-24),
    proof.Rule(False, 0.0, 2.0**-12, smallest=1e-3),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", [(9, 64), (3, 37), (40, 1)])
def test_elements_are_judged_as_fractions_judge_them(
    shape: tuple[int, int], dtypes: tuple[str, str], rule: proof.Rule
) -> None:
    """Some elements are right, some the neighbour, some near a tie, some off by several units."""
    random = np.random.default_rng(7)
    before = narrow(random.standard_normal(shape).astype(np.float32), dtypes[0])
    W = widen(before, dtypes[0], np.float64)
    change = 0.01 * random.standard_normal(shape)
    change[:, ::4] = (W * 2.0**-8)[:, ::4]  # W + ΔW is near the middle of two numbers
    after = narrow((W + change).astype(np.float32), dtypes[1])
    after = (after + random.integers(-1, 2, shape) * (random.random(shape) < 0.5)).astype(unsigned(dtypes[1]))
    after.flat[:1] += unsigned(dtypes[1]).type(9)
    wanted = judged(W, widen(after, dtypes[1], np.float64), change, dtypes[1], rule)
    made = [proof.compare(before, after, dtypes, change, rule, width=width) for width in proof.widths()]
    assert len(set(made)) == 1
    assert (made[0].wrong, made[0].far) == (wanted.wrong, wanted.far)
    assert [made[0].actual, made[0].expected, made[0].total] == pytest.approx(
        [wanted.actual, wanted.expected, wanted.total], rel=1e-9, abs=1e-12
    )
    assert 0 < made[0].wrong < before.size


@pytest.mark.parametrize("of_change", [False, True])
@pytest.mark.parametrize("width", proof.widths())
def test_a_unit_of_the_change_is_allowed_where_numbers_cancel(width: int, of_change: bool) -> None:
    """W + ΔW = 2^-10 of numbers near 1: half a unit of ΔW is many units of the result."""
    W, change = np.full((2, 20), 1.0), np.full((2, 20), 2.0**-10 - 1)
    result = np.full((2, 20), 2.0**-10 + 2.0**-9)
    found = proof.compare(
        narrow(W.astype(np.float32), "BF16"), narrow(result.astype(np.float32), "BF16"), ("BF16", "BF16"), change,
        proof.Rule(False, 1.0, 2.0**-7, of_change=of_change), width=width,
    )  # fmt: skip
    assert (found.wrong, found.far) == (40, 0 if of_change else 40)


@pytest.mark.parametrize("width", proof.widths())
def test_some_rows_and_columns_are_compared(width: int) -> None:
    before, after, W, result = pair((20, 90), ("F16", "F16"))
    rows, columns = np.array([0, 7, 19], np.uint32), np.sort(np.random.default_rng(0).permutation(90)[:37])
    change = np.full((20, 90), 0.005)
    for places in ({"rows": rows}, {"columns": columns.astype(np.uint32)}):
        pick = (rows, slice(None)) if "rows" in places else (slice(None), columns)
        found = proof.compare(before, after, ("F16", "F16"), change[pick], RULES[1], width=width, **places)
        wanted = judged(W[pick], result[pick], change[pick], "F16", RULES[1])
        assert (found.wrong, found.far) == (wanted.wrong, wanted.far)
        assert found.total == pytest.approx(wanted.total)
    with pytest.raises(ValueError, match="do not go together"):
        proof.compare(before, after, ("F16", "F16"), change[:3], RULES[1], rows=rows + np.uint32(1))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("width", proof.widths())
@pytest.mark.parametrize("dtype", proof.DTYPES)
def test_nan_and_infinity_are_far_from_every_number(dtype: str, width: int, rule: proof.Rule) -> None:
    numbers = np.ones((1, 40), np.float32)
    before, change = narrow(numbers, dtype), np.zeros((1, 40))
    for place, value in ((3, np.nan), (39, np.inf), (17, -np.inf)):
        spoiled = numbers.copy()
        spoiled[0, place] = value
        bits = narrow(spoiled, dtype)
        for pair in ((before, bits), (bits, before), (bits, bits)):
            found = proof.compare(*pair, (dtype, dtype), change, rule, width=width)
            assert (found.wrong, found.far) == (1, 1)
        there = change.copy()
        there[0, place] = value
        assert proof.compare(before, before, (dtype, dtype), there, rule, width=width).far == 1


def test_arrays_that_do_not_go_together_are_refused() -> None:
    before, after, *_ = pair((4, 6), ("BF16", "BF16"))
    X, Y = np.zeros((6, proof.PROBES)), np.zeros((4, proof.PROBES))
    for wrong in ((X, Y[:3]), (X[:5], Y), (X, Y.astype(np.float32)), (Y, X)):
        with pytest.raises(ValueError, match="do not go together"):
            proof.measure(before, after, ("BF16", "BF16"), *wrong)
    with pytest.raises(ValueError, match="do not go together"):
        proof.measure(before, after[:3], ("BF16", "BF16"))


@pytest.mark.skipif(not proof.passes(), reason="no file is read in C here")
@pytest.mark.parametrize("shape", [(64, 300), (3, 5), (900, 1030), (70, 20000)])
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
def test_a_pass_measures_what_is_in_both_files(shape: tuple[int, int], dtypes: tuple[str, str], tmp_path: Path) -> None:
    """In two calls, at every width; some columns are kept; in each file the tensor begins elsewhere."""
    before, after, W, result = pair(shape, dtypes)
    rows, columns = shape
    X = np.random.default_rng(1).standard_normal((columns, proof.PROBES))
    kept = np.array(sorted({0, columns // 3, columns - 1}), np.uint32)
    starts, room = (8, 24), proof.room_for(columns, dtypes)
    for name, start, bits in (("before", 8, before), ("after", 24, after)):
        (tmp_path / name).write_bytes(bytes(start) + bits.tobytes() + b"more")
    made = []
    with (tmp_path / "before").open("rb") as ours, (tmp_path / "after").open("rb") as theirs:
        for width in proof.widths():
            Y, memory = np.zeros((rows, proof.PROBES)), (np.empty(room, np.uint8), np.empty(room, np.uint8))
            way = proof.Pass((ours.fileno(), theirs.fileno()), starts, dtypes, X, Y, kept, memory)
            half = rows // 2
            parts = [way.rows(0, half, width=width), way.rows(half, rows - half, width=width)]
            made.append((parts[0][0], parts[1][0], Y.tobytes()))
            assert sum(part[0] for part in parts) == pytest.approx(float((result**2).sum()), rel=1e-13)
            assert sum(part[1] for part in parts) == int((result != W).sum())
            for stored, bits in ((2, before), (3, after)):
                np.testing.assert_array_equal(np.concatenate([part[stored] for part in parts]), bits[:, kept])
            np.testing.assert_allclose(Y, (result - W) @ X, rtol=0, atol=1e-11)
            with pytest.raises(ValueError, match="not all among"):
                way.rows(half, rows, width=width)
    assert len(set(made)) == 1


@pytest.mark.skipif(not proof.passes(), reason="no file is read in C here")
def test_a_file_that_ends_is_told(tmp_path: Path) -> None:
    files, X, Y = [tmp_path / "before", tmp_path / "after"], np.zeros((16, proof.PROBES)), np.zeros((9, proof.PROBES))
    none, room = np.zeros(0, np.uint32), proof.room_for(16, ("F16", "F16"))
    for which in (0, 1):
        for number, path in enumerate(files):
            path.write_bytes(bytes(10 + 9 * 32 - (number == which)))
        with files[0].open("rb") as ours, files[1].open("rb") as theirs:
            memory = (np.empty(room, np.uint8), np.empty(room, np.uint8))
            way = proof.Pass((ours.fileno(), theirs.fileno()), (10, 10), ("F16", "F16"), X, Y, none, memory)
            with pytest.raises(EOFError) as end:
                way.rows(0, 9)
            assert end.value.args == (which, 10 + 9 * 32 - 1)
    way = proof.Pass((-1, -1), (0, 0), ("F16", "F16"), X, Y, none, memory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        way.rows(0, 9)
    for wrong in ((X[:, :3], Y, none, memory), (X, Y, np.array([16], np.uint32), memory), (X, Y, none, (X, X))):
        with pytest.raises(ValueError, match=r"do not go together|not uint32"):
            proof.Pass((0, 0), (0, 0), ("F16", "F16"), *wrong)
