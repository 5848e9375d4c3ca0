"""Tensors that C passes from file to file: the bytes and sums of `add_products`, in any tiles, and what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import native
from loratools.linalg.native import tiles
from loratools.linalg.native.factors import Memory
from loratools.storage import files
from tests.linalg.native.test_factors import summed

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no C code, or files are read in another way")

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: list[type[Any]] = [np.uint16, np.float16, np.float32]
NAMES = {"uint16": "BF16", "float16": "F16", "float32": "F32"}
RECTANGLES = {
    "whole": [((0, 50, 1), (0, 70, 1))],
    "parts": [((0, 20, 1), (0, 70, 1)), ((20, 50, 1), (0, 70, 1))],
    "some rows": [((9, 31, 1), (0, 70, 1))],
    "every third row": [((0, 50, 3), (0, 70, 1)), ((2, 50, 3), (0, 70, 1))],
    "some columns": [((3, 50, 1), (5, 40, 1)), ((3, 50, 1), (40, 66, 2))],
}


def draw(dtype: type[Any], rectangles: str, dora: bool) -> tuple[Array, list[tiles.Rectangle], list[native.Products]]:
    """Return a random W, and random products for its rectangles, as they are passed and as arrays."""
    random = np.random.default_rng(len(rectangles))
    W = random.standard_normal((50, 70)).astype(np.float32)
    stored: Array = (W.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else W.astype(dtype)
    places, arrays = [], []
    for rows, columns in RECTANGLES[rectangles]:
        count, across = len(range(*rows)), len(range(*columns))
        B, A = (random.standard_normal(shape).astype(np.float32) for shape in ((count, 5), (5, across)))
        m = random.uniform(1, 3, count).astype(np.float32).astype(float) if dora else None
        terms = native.products(B, A, B, np.ones(5), m)
        places.append(tiles.Rectangle(rows, columns, summed([(B, A, 1.0)], m), 1e-3))
        arrays.append(terms)
    return stored, places, arrays


@contextmanager
def passage(W: Array, places: list[tiles.Rectangle], folder: Path, cut: int = 0) -> Iterator[tiles.Passage]:
    """Open a file with W behind 6 bytes, without its last `cut` ones, and one to write it to, behind 10."""
    (folder / "in").write_bytes(b"before" + W.tobytes()[: W.nbytes - cut])
    source, target = os.open(folder / "in", os.O_RDONLY), os.open(folder / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    covered = sum(len(range(*each.rows)) * len(range(*each.columns)) for each in places)
    way = tiles.Passage(places, 70, NAMES[W.dtype.name], Memory(), everywhere=covered == W.size)
    way.between(source, 6, target, 10)
    try:
        yield way
    finally:
        os.close(source)
        os.close(target)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(sorted(RECTANGLES)), st.integers(1, 50), st.booleans())
def test_any_tiles_write_what_a_single_call_does(
    tmp_path_factory: pytest.TempPathFactory, dtype: type[Any], rectangles: str, step: int, dora: bool
) -> None:
    folder = tmp_path_factory.mktemp("passed")
    W, places, arrays = draw(dtype, rectangles, dora)
    wanted, retained, total, changed = W.copy(), 0.0, 0.0, 0
    for each, terms in zip(places, arrays, strict=True):
        inside = (slice(*each.rows), slice(*each.columns))
        count = len(range(*each.rows))
        outcome = native.add_products(
            W[inside], wanted[inside], terms, slice(0, count), np.empty(terms.memory, np.float32),
            gains=np.zeros(count) if dora else None, bound=each.bound, measured=count,
        )  # fmt: skip
        retained, total, changed = retained + outcome.retained, total + outcome.total, changed + outcome.changed
    with passage(W, places, folder) as way:
        passed = [way.rows(first, min(step, 50 - first), 50) for first in range(0, 50, step)]
    assert (folder / "out").read_bytes() == bytes(10) + wanted.tobytes()
    bits, top = (np.uint32, 0x7FFFFFFF) if dtype is np.float32 else (np.uint16, 0x7FFF)
    largest = [int((array.view(bits) & top).max()) for array in (wanted, W)]  # W too where some of it stays
    assert max(each.largest for each in passed) in (largest[0], max(largest))
    assert sum(each.retained for each in passed) == pytest.approx(retained, rel=1e-12)
    assert sum(each.total for each in passed) == pytest.approx(total, rel=1e-12)
    assert sum(each.changed for each in passed) == changed


def test_what_a_tile_was_and_what_it_became_can_both_be_seen(tmp_path: Path) -> None:
    """2,000 rows of 280 bytes: C reads them in several blocks, and writes them at once."""
    random = np.random.default_rng(0)
    W, B, A = (random.standard_normal(shape).astype(np.float32) for shape in ((2000, 70), (2000, 5), (5, 70)))
    places = [tiles.Rectangle((0, 2000, 1), (0, 70, 1), summed([(B, A, 1.0)], None), 0.0)]
    (tmp_path / "in").write_bytes(W.tobytes())
    way = tiles.Passage(places, 70, "F32", Memory(), everywhere=True)
    with files.descriptor(tmp_path / "in") as source, files.descriptor(tmp_path / "out", os.O_RDWR | os.O_CREAT) as out:
        way.between(source, 0, out, 0)
        way.rows(100, 1900, 0)
    assert bytes(way.stored) == W[100:].tobytes()
    assert bytes(way.made) == (tmp_path / "out").read_bytes()[100 * 280 :] != bytes(way.stored)


@pytest.mark.parametrize("rectangles", sorted(RECTANGLES))
def test_the_first_rows_of_a_tile_are_measured_and_no_others(tmp_path: Path, rectangles: str) -> None:
    W, places, _ = draw(np.float32, rectangles, False)
    with passage(W, places, tmp_path) as way:
        passed = way.rows(10, 30, 11)
    made = np.frombuffer((tmp_path / "out").read_bytes()[10:], np.float32)[10 * 70 :].reshape(-1, 70)
    assert len(made) == 30
    assert passed.changed == np.count_nonzero(made[:11] != W[10:21])
    assert passed.total == pytest.approx(float(np.square(made[:11].astype(np.float64) - W[10:21]).sum()), rel=1e-5)


def test_a_row_without_direction_is_named_by_its_rectangle(tmp_path: Path) -> None:
    W, places, _ = draw(np.float32, "parts", True)
    left = np.ones((30, 2))
    W[33], left[13] = 0, 0
    places[1] = tiles.Rectangle((20, 50, 1), (0, 70, 1), summed([(left, np.ones((2, 70)), 1.0)], np.ones(30)), 0.0)
    with passage(W, places, tmp_path) as way:
        assert way.rows(0, 30, 0).zero_row is None
        assert way.rows(30, 20, 0).zero_row == (1, 13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rectangles", sorted(RECTANGLES))
def test_what_is_not_finite_shows_in_the_largest_wherever_it_lies(tmp_path: Path, bad: float, rectangles: str) -> None:
    W, places, _ = draw(np.float32, rectangles, False)
    W[41, 69] = bad
    with passage(W, places, tmp_path) as way:
        assert way.rows(0, 41, 0).largest < 0x7F800000
        assert way.rows(41, 9, 0).largest >= 0x7F800000


def test_a_file_that_ends_too_early_says_where(tmp_path: Path) -> None:
    W, places, _ = draw(np.float16, "whole", False)
    with passage(W, places, tmp_path, cut=3) as way:
        way.rows(0, 49, 0)
        with pytest.raises(EOFError) as ended:
            way.rows(0, 50, 0)
    assert ended.value.args == (6 + W.nbytes - 3,)


def test_what_cannot_be_read_or_written_is_raised(tmp_path: Path) -> None:
    W, places, _ = draw(np.float16, "whole", False)
    with passage(W, places, tmp_path) as way:
        only_read, only_written = os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_WRONLY)
        for source, target in ((only_written, only_written), (only_read, only_read)):
            way.between(source, 6, target, 10)
            with pytest.raises(OSError, match="descriptor"):
                way.rows(0, 50, 0)
        os.close(only_read)
        os.close(only_written)
