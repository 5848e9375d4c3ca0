"""One tensor by the C code and by NumPy: the same bytes and the same measurements, whatever the sites and the tiles."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter.site import Site
from loratools.engine import products
from loratools.engine.arithmetic import native as fused
from loratools.engine.arithmetic.sums import RescaledSum, SumOfProducts
from loratools.engine.tensor import TensorResult
from loratools.errors import IncompatibleAdapter
from loratools.linalg import native
from loratools.storage.codecs import floats
from loratools.storage.header import TensorSpec

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C compiler")

MATRIX = (24, 40)
WHOLE = Site.whole("W", MATRIX)
SITES = {
    "whole": [WHOLE],
    "two parts": [
        Site("W", MATRIX, (0, 8, 1), (0, 40, 1), (0, 8)),
        Site("W", MATRIX, (8, 24, 1), (0, 40, 1), (0, 16)),
    ],
    "one part": [Site("W", MATRIX, (9, 20, 1), (0, 40, 1), (0, 11))],
    "interleaved": [
        Site("W", MATRIX, (0, 24, 2), (0, 40, 1), (0, 12)),
        Site("W", MATRIX, (1, 24, 2), (0, 40, 1), (0, 12)),
    ],
    "columns": [Site("W", MATRIX, (0, 24, 1), (5, 29, 1), (0, 24), True)],
}


def term(site: Site, rank: int, seed: int, dora: bool) -> SumOfProducts:
    """Return random products for a site."""
    random = np.random.default_rng(seed)
    rows, columns = site.shape
    factor, right = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    scale = random.standard_normal(rank) * 0.1
    left = (factor * scale).astype(np.float32)
    if not dora:
        return SumOfProducts(site, left, right, factor, scale)
    return RescaledSum(site, left, right, factor, scale, random.uniform(1, 9, rows), np.zeros(rows))


def save(path: Path, seed: int) -> TensorSpec:
    W = np.random.default_rng(seed).standard_normal(MATRIX).astype(np.float32)
    path.write_bytes((W.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return TensorSpec("BF16", MATRIX, path, 0, path.stat().st_size)


def run(spec: TensorSpec, terms: list[SumOfProducts], out: Path, in_c: bool, tile: int) -> tuple[bytes, TensorResult]:
    """Change the tensor, and return its bytes and what was measured."""
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        task = products.ProductTask("W", spec, target, 0, terms, ["blake3"], "full", 0)
        assert fused.serves(task) or not in_c
        result = products.run(task, floats.Buffers(), lambda _: None, lambda: False, tile, in_c)
    finally:
        os.close(target)
    return out.read_bytes(), result


tiles = st.sampled_from([80, 400, 1920])  # bytes: a row, five, all


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SITES)), st.integers(1, 9), st.integers(0, 99), st.booleans(), tiles)
def test_both_write_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, sites: str, rank: int, seed: int, dora: bool, tile: int
) -> None:
    folder = tmp_path_factory.mktemp("fused")
    spec = save(folder / "W", seed)

    def terms() -> list[SumOfProducts]:
        return [term(site, rank, seed + i, dora and not site.transposed) for i, site in enumerate(SITES[sites])]

    (native_bytes, found), (numpy_bytes, wanted) = (
        run(spec, terms(), folder / "out", in_c, size) for in_c, size in ((True, tile), (False, 1920))
    )
    one, other = (np.frombuffer(raw, np.uint16).astype(np.int64) for raw in (native_bytes, numpy_bytes))
    assert (one != other).sum() <= 1  # the last bit of a float32 sum, where it decides a tie
    assert np.abs(one - other).max() <= 1
    assert found.digests == wanted.digests
    assert (found.retained, found.total) == pytest.approx((wanted.retained, wanted.total), rel=1e-4)
    assert found.changed == pytest.approx(wanted.changed, abs=1)


@pytest.mark.parametrize("place", [(0, 0), (12, 30)])
@pytest.mark.parametrize("in_c", [True, False])
def test_infinities_of_the_base_are_refused_wherever_they_are(
    tmp_path: Path, place: tuple[int, int], in_c: bool
) -> None:
    spec = save(tmp_path / "W", seed=1)
    raw = np.fromfile(spec.file, np.uint16).reshape(MATRIX)
    raw[place] = 0x7F80
    raw.tofile(spec.file)
    with pytest.raises(IncompatibleAdapter, match="W: the merged values are not finite in BF16"):
        run(spec, [term(SITES["one part"][0], 3, 1, dora=False)], tmp_path / "out", in_c, 400)


@pytest.mark.parametrize("in_c", [True, False])
def test_a_row_without_direction_is_named(tmp_path: Path, in_c: bool) -> None:
    spec = save(tmp_path / "W", seed=1)
    raw = np.fromfile(spec.file, np.uint16).reshape(MATRIX)
    raw[9 + 7] = 0
    raw.tofile(spec.file)
    given = term(SITES["one part"][0], 3, 1, dora=True)
    given.left[7], given.factor[7] = 0, 0
    with pytest.raises(IncompatibleAdapter, match="zero in all of output feature 7"):
        run(spec, [given], tmp_path / "out", in_c, 400)


def test_what_the_c_code_is_not_made_for_goes_through_numpy(tmp_path: Path) -> None:
    spec = save(tmp_path / "W", seed=1)

    def serves(*sites: Site, dtype: str = "BF16") -> bool:
        source = TensorSpec(dtype, MATRIX, spec.file, 0, spec.stop)
        terms = [term(site, 2, i, dora=False) for i, site in enumerate(sites)]
        return fused.serves(products.ProductTask("W", source, 0, 0, terms, [], "off", 0))

    assert serves(WHOLE)
    assert not serves(WHOLE, dtype="F16")
    assert not serves(WHOLE, SITES["one part"][0])  # they overlap
    assert not serves(Site("W", MATRIX, (0, 24, 1), (0, 40, 2), (0, 20), True))
