"""A rectangle cut into row tiles is the rectangle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter.sites import Site


@given(st.data())
def test_overlaps_with_all_tiles_cover_each_row_once(data: st.DataObject) -> None:
    height = data.draw(st.integers(1, 40), "height")
    step = data.draw(st.integers(1, 5), "step")
    first = data.draw(st.integers(0, height - 1), "first")
    last = data.draw(st.integers(first + 1, height), "last")
    tile = data.draw(st.integers(1, height + 3), "tile")
    site = Site("W", (height, 1), (first, last, step), (0, 1, 1), (0, len(range(first, last, step))))
    matrix, change = np.zeros(height), np.arange(1.0, 1 + site.shape[0])
    for start in range(0, height, tile):
        stop = min(start + tile, height)
        if met := site.overlap(start, stop):
            inside, rows = matrix[start:stop][met[0]], change[met[1]]
            assert len(inside) == len(rows) > 0
            inside += rows
    wanted = np.zeros(height)
    wanted[first:last:step] += change
    np.testing.assert_array_equal(matrix, wanted)


def test_whole() -> None:
    assert Site.whole("W", (3, 5)) == Site("W", (3, 5), (0, 3, 1), (0, 5, 1), (0, 3))
    assert Site.whole("W", (3, 5), transposed=True).part_rows == slice(0, 5)
