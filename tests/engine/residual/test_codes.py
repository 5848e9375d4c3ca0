"""Codes of floats by their place among the candidates of a prediction: every bit pattern comes back."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine.residual import codes
from loratools.errors import BadFile
from loratools.storage.codecs.floats import narrow, widen


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40),
    after=st.lists(st.integers(0, 2**16 - 1), min_size=40, max_size=40),
    dtype=st.sampled_from(["BF16", "F16"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bits_come_back(bits: list[int], after: list[int], dtype: str) -> None:
    """Infinities, NaN, zeros of both signs, whatever the prediction is."""
    W, merged = np.array(bits, np.uint16), np.array(after[: len(bits)], np.uint16)
    with np.errstate(invalid="ignore"):
        prediction = widen(merged, dtype, np.float32)
    prediction[np.isnan(prediction)] = 0
    block = codes.encode(W, merged, prediction, dtype, dtype)
    found = codes.decode(memoryview(block), merged, prediction, dtype, dtype)
    assert found.tolist() == bits


def test_what_rounding_left_costs_as_many_bits_as_it_destroyed() -> None:
    """W' one binade above W leaves two candidates: one bit for each, and nothing where the binades are equal."""
    W = np.random.default_rng(0).uniform(1, 2, 80_000).astype(np.float32)
    base = narrow(W, "BF16")
    stored = widen(base, "BF16", np.float32)
    sizes = []
    for change in (0.0, 1.5 + 2**-9):
        after = narrow(stored + np.float32(change), "BF16")
        prediction = widen(after, "BF16", np.float32) - np.float32(change)
        block = codes.encode(base, after, prediction, "BF16", "BF16")
        assert codes.decode(memoryview(block), after, prediction, "BF16", "BF16").tolist() == base.tolist()
        sizes.append(len(block))
    assert sizes[0] < 20
    assert 80_000 / 8 * 0.99 < sizes[1] < 80_000 / 8 * 1.2


def test_a_block_of_another_tile_is_refused() -> None:
    values = np.arange(1, 200, dtype=np.uint16)
    prediction = widen(values, "BF16", np.float32)
    block = codes.encode(values[::-1].copy(), values, prediction, "BF16", "BF16")
    with pytest.raises(BadFile, match=r"another size|beyond its tile|contradicts itself"):
        codes.decode(memoryview(block), values[:50], prediction[:50], "BF16", "BF16")
    with pytest.raises(BadFile, match="contradicts itself"):
        codes.decode(memoryview(block)[:-1], values, prediction, "BF16", "BF16")


@pytest.mark.parametrize("count", [1, 5, 64, 85, 86, 1000, 5460, 5461, 40_000])
def test_exceptions_of_any_number_come_back_in_no_more_room_than_usual(count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 200, 6 * count, np.uint8)
    numbers[count : 4 * count] = 0
    raw = numbers.tobytes()
    block = codes.framed(codes.SPARSE, count, b"", raw)
    assert codes.unframed(memoryview(block), count, 2) == (codes.SPARSE, count, b"", raw)
    assert len(block) - len(codes.framed(codes.SPARSE, 0, b"", b"")) <= len(zlib.compress(raw, 6)) * 1.02 + 2
