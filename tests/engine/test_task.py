"""Which tiles and rows are measured, and where float32 does not do."""

from __future__ import annotations

import pytest

from loratools.engine.task import SAMPLE, near_zero, sampled_rows, sampled_tiles


def test_one_tile_in_sixteen_is_sampled_by_seed_and_name() -> None:
    chosen = sampled_tiles("a", 0, "sample", 100)
    assert {b - a for a, b in zip(sorted(chosen), sorted(chosen)[1:], strict=False)} == {SAMPLE}
    assert len({sampled_tiles(name, seed, "sample", 100) for name in "abcdef" for seed in range(20)}) == SAMPLE
    assert all(len(sampled_tiles("a", seed, "sample", 3)) == 1 for seed in range(9))


@pytest.mark.parametrize(("retention", "tiles", "count"), [("off", 5, 0), ("full", 5, 5), ("sample", 0, 0)])
def test_all_tiles_or_none_are_sampled_where_that_is_asked_for(retention: str, tiles: int, count: int) -> None:
    assert sampled_tiles("a", 3, retention, tiles) == frozenset(range(count))


@pytest.mark.parametrize(
    ("retention", "rows", "columns", "wanted"),
    [
        ("full", 64, 8192, 64),
        ("sample", 64, 8192, 8),  # 2^16 elements
        ("sample", 20, 100, 20),  # fewer than that are all
        ("sample", 7, 1 << 20, 1),
        ("sample", 8192, 1024, 1024),  # an eighth
        ("sample", 5, 0, 5),
    ],
)
def test_an_eighth_of_a_sampled_tile_is_measured_or_more(retention: str, rows: int, columns: int, wanted: int) -> None:
    assert sampled_rows(retention, rows, columns) == wanted


def test_near_zero_is_where_a_float32_sum_errs_by_a_quarter_of_a_unit() -> None:
    """2^-24 of the largest term, against units of 2^-8 and 2^-11 of the result."""
    assert near_zero("BF16") == 4 * 2.0**-24 / 2.0**-8
    assert near_zero("F16") == 4 * 2.0**-24 / 2.0**-11
    assert near_zero("F32") is near_zero("F64") is None
