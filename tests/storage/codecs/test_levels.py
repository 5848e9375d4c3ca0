"""Codes of numbers: the nearest by exhaustion, ties to even, or a neighbour at random."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.storage.codecs._levels import FP4, FP6, Levels, Whole

EVERY = {"int3": Whole(3), "int4": Whole(4), "int8": Whole(8), "bytes": Whole(4, bytes=True), "FP4": FP4, "FP6": FP6}


@pytest.mark.parametrize("name", EVERY)
def test_the_nearest_and_of_two_the_even_one(name: str) -> None:
    levels: Levels = EVERY[name]
    used = np.unique(levels.table[(levels.table >= levels.least) & (levels.table <= levels.most)])
    x = np.random.default_rng(3).uniform(1.3 * levels.least, 1.3 * levels.most, 1000).astype(np.float32)
    found = levels.table[levels.codes(x)]
    assert np.array_equal(np.abs(found - x), np.abs(used[:, None] - x).min(axis=0))
    assert np.array_equal(levels.table[levels.codes(used)], used)
    middles = (used[1:] + used[:-1]) / 2
    codes = levels.codes(middles)
    assert np.isin(levels.table[codes], used).all()
    last = levels.table[codes] if isinstance(levels, Whole) else codes & (len(levels.table) // 2 - 1)
    assert (last % 2 == 0).all()
    assert np.array_equal(levels.table[levels.codes(np.array([np.nan, np.inf, -np.inf], np.float32))],
                          [0, levels.most, levels.least])  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_at_random_both_neighbours_are_as_frequent_as_near(name: str) -> None:
    levels: Levels = EVERY[name]
    random = np.random.default_rng(4)
    x = random.uniform(levels.least, levels.most, 200).astype(np.float32)
    drawn = np.stack(
        [levels.table[levels.codes(x, lambda shape: random.random(shape, np.float32))] for _ in range(2000)]
    )
    used = np.unique(levels.table[(levels.table >= levels.least) & (levels.table <= levels.most)])
    below = used[np.searchsorted(used, x, side="right") - 1]
    above = used[np.minimum(np.searchsorted(used, x, side="right"), len(used) - 1)]
    assert ((drawn == below) | (drawn == above)).all()
    assert (np.abs(drawn.mean(axis=0) - x) <= 5 * 0.5 * (above - below) / 2000**0.5 + 1e-6).all()
