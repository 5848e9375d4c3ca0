"""The residual in C: predictions and codes are those of NumPy's formulas, to the bit, at every width of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.engine.residual import codes
from loratools.linalg.native import residual
from loratools.storage.codecs.floats import narrow, unsigned, widen

pytestmark = pytest.mark.skipif(not residual.available(), reason="installed without a C compiler")
Array = np.ndarray[Any, np.dtype[Any]]
WIDTHS = residual.widths()


def numbers(dtype: str, count: int, seed: int) -> Array:
    """Return bits of finite numbers of every size, zeros of both signs and subnormal ones among them."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal(count) * 2.0 ** random.integers(-30, 12, count)).astype(np.float32)
    values[: min(4, count)] = [0.0, -0.0, 1e-41, -6e-8][:count]
    return narrow(values, dtype)


def encoded(scan: residual.Scan | None, count: int, width: int) -> bytes:
    assert scan is not None
    return codes.joined(scan.packed(width=width), scan.at, scan.high.astype(scan.P.dtype), count)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
def test_stored_numbers_are_widened_as_numpy_does(dtype: str, width: int) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16) if dtype != "F32" else numbers("F32", 5000, 0)
    wanted = widen(bits, dtype, np.float32)
    finite = ~np.isnan(wanted)
    for count in (len(bits), 17, 1, 0):
        found = residual.widened(bits[:count], dtype, width=width)
        np.testing.assert_array_equal(
            found.view(np.uint32)[finite[:count]], wanted[:count].view(np.uint32)[finite[:count]]
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(9, 64, 16), (1, 5, 3), (25, 33, 1), (16, 16, 0), (2, 130, 70)])
def test_what_is_taken_back_is_what_numpy_takes_back(rows: int, columns: int, rank: int, width: int) -> None:
    """With g for rows, for columns, or none; on rows that lie apart."""
    random = np.random.default_rng(rows)
    left = random.integers(-(2**20), 2**20, (rows, rank)) * 2.0 ** random.integers(-30, -15, (rows, 1))
    right = random.integers(-(2**20), 2**20, (rank, columns)) * 2.0 ** random.integers(-30, -10, (1, columns))
    room = random.standard_normal((rows, columns + 7)).astype(np.float32)
    for divided in ("none", "by_row", "by_column"):
        g = random.uniform(0.3, 3, rows if divided == "by_row" else columns).astype(np.float32)
        wanted = room.copy()
        region = wanted[:, 3 : 3 + columns]
        region /= {"none": np.float32(1), "by_row": g[: len(room), None], "by_column": g}[divided]
        region -= (left @ right).astype(np.float32)
        found = room.copy()
        more: dict[str, Any] = {} if divided == "none" else {divided: g}
        residual.take_back(found[:, 3 : 3 + columns], left, residual.panels(right), width=width, **more)
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
@pytest.mark.parametrize("size", [0.0, 0.003, 0.4, 30.0])
@pytest.mark.parametrize("count", [4096, 1003, 7])
def test_a_tile_is_coded_and_read_as_numpy_does(count: int, size: float, dtype: str, width: int) -> None:
    """Changes of every size: none, below a unit, many binades up; and a prediction that is a little off."""
    random = np.random.default_rng(count)
    base = numbers(dtype, count, 1)
    W = widen(base, dtype, np.float32)
    change = (size * random.standard_normal(count)).astype(np.float32)
    after = narrow(W + change, dtype)
    prediction = widen(after, dtype, np.float32) - change * np.float32(1 + 1e-6)
    wanted = codes.encode(base, after, prediction, dtype, dtype)
    assert encoded(residual.scan(prediction, after, dtype, base, width=width), count, width) == wanted
    scan = residual.scan(prediction, after, dtype, width=width)
    assert scan is not None
    packed, at, high = codes.apart(memoryview(wanted), scan.spread, count, unsigned(dtype))
    found = scan.place(np.frombuffer(packed, np.uint8), at.astype(np.uint32), high.astype(np.uint32), width=width)
    assert found.tobytes() == base.tobytes()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", residual.DTYPES)
def test_any_base_is_coded_from_any_prediction(dtype: str, width: int) -> None:
    """The base may be anything, infinities and NaN too, and so may W'; only the prediction must be finite."""
    random = np.random.default_rng(5)
    of_bits = {"size": 5000, "dtype": unsigned(dtype), "endpoint": True, "high": np.iinfo(unsigned(dtype)).max}
    base, after = random.integers(0, **of_bits), random.integers(0, **of_bits)
    prediction = widen(numbers(dtype, 5000, 6), dtype, np.float32)
    prediction[::3] *= np.float32(1 + 2**-9)
    for comparable in (after, None):
        other = dtype if comparable is not None else "F64"
        wanted = codes.encode(base, after, prediction, dtype, other)
        assert encoded(residual.scan(prediction, comparable, dtype, base, width=width), 5000, width) == wanted
        scan = residual.scan(prediction, comparable, dtype, width=width)
        assert scan is not None
        packed, at, high = codes.apart(memoryview(wanted), scan.spread, 5000, unsigned(dtype))
        found = scan.place(np.frombuffer(packed, np.uint8), at.astype(np.uint32), high.astype(np.uint32), width=width)
        assert found.tobytes() == base.tobytes()


def test_predictions_that_are_not_finite_are_left_to_numpy() -> None:
    base = numbers("BF16", 40, 0)
    for bad in (np.nan, np.inf, -np.inf):
        prediction = widen(base, "BF16", np.float32)
        prediction[37] = bad
        assert residual.scan(prediction, base, "BF16", base) is None


def test_arrays_that_do_not_go_together_are_refused() -> None:
    P, left, right = np.zeros((4, 32), np.float32), np.zeros((4, 3)), residual.panels(np.zeros((3, 32)))
    for wrong in (
        {"left": left[:3]}, {"left": left[:, :2]}, {"right": right[:1]}, {"by_row": np.ones(3, np.float32)},
        {"by_column": np.ones(32)}, {"P": P.astype(np.float64)}, {"P": P[:, ::2]},
    ):  # fmt: skip
        arguments: dict[str, Any] = {"P": P, "left": left, "right": right, **wrong}
        with pytest.raises(ValueError, match=r"go together|rows of float32"):
            residual.take_back(**arguments)
