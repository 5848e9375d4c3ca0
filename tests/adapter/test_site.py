"""A rectangle cut into row tiles is the rectangle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter.site import Site


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


def test_sites_cut_by_each_other() -> None:
    """Pieces of overlapping sites are equal or do not meet, and carry their rows of ΔW along."""
    fused = Site.whole("w", (12, 5))
    q = Site("w", (12, 5), (0, 6, 1), (0, 5, 1), (0, 6))
    v = Site("w", (12, 5), (9, 12, 1), (0, 5, 1), (0, 3))
    places = [(one.rows, one.part) for one in fused.cut([fused, q, v])]
    assert places == [((0, 6, 1), (0, 6)), ((6, 9, 1), (6, 9)), ((9, 12, 1), (9, 12))]
    assert q.cut([fused, q, v]) == [q]
    late = Site("w", (12, 5), (4, 12, 1), (0, 5, 1), (1, 9))
    assert [(one.rows, one.part) for one in late.cut([v])] == [((4, 9, 1), (1, 6)), ((9, 12, 1), (6, 9))]
    turned = Site.whole("w", (5, 12), transposed=True)
    part = Site("w", (5, 12), (0, 5, 1), (4, 8, 1), (0, 4), True)
    cut = [(one.columns, one.part, one.rows) for one in turned.cut([part])]
    assert cut == [((0, 4, 1), (0, 4), (0, 5, 1)), ((4, 8, 1), (4, 8), (0, 5, 1)), ((8, 12, 1), (8, 12), (0, 5, 1))]
    stepped = Site("w", (12, 5), (0, 12, 2), (0, 5, 1), (0, 6))
    assert stepped.cut([q]) == [stepped]
    assert not stepped.meets(Site("w", (12, 5), (1, 12, 2), (0, 5, 1), (0, 6)))
