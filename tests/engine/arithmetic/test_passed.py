"""Tensors that C passes from file to file: the bytes and the record of the same in memory; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine.arithmetic.native import NativeRows
from loratools.engine.arithmetic.passed import PassedRows
from loratools.engine.load import SiteProduct
from loratools.engine.task import TensorTask
from loratools.engine.tensor import InMemory, run
from loratools.errors import BadFile, IncompatibleAdapter
from loratools.linalg import native
from loratools.linalg.native import tiles
from loratools.linalg.native.factors import Matrix, Memory, Sum
from loratools.storage.codecs import floats
from tests.engine.arithmetic import sites as cases
from tests.engine.arithmetic.sites import MATRIX, SITES, TILES, WHOLE

pytestmark = pytest.mark.skipif(not (native.available() and tiles.available()), reason="no C code that reads files")
DTYPES = ["BF16", "F16", "F32"]


def matrix(array: cases.Array) -> Matrix:
    """Return an array as a stored matrix, in F32."""
    piece = Memory().of("array", array.size * 4)
    piece.view[:] = array.astype(np.float32).tobytes()
    return Matrix.of(piece, "F32", array.shape)


def passed(items: Sequence[SiteProduct]) -> Callable[[TensorTask], PassedRows]:
    """Return what passes a tensor through these products, each of whose columns and rows has a scale of its own."""
    sums = []
    for item in items:
        (rows, columns), rank = item.site.shape, len(item.scale)
        rescaled = item.magnitude is not None
        memory = Memory()
        room = memory.of("sum", Sum.nbytes(rows, columns, rank, rescaled=rescaled))
        total = Sum(rows, columns, rank, room, rescaled=rescaled)
        for k in range(rank):
            left, right = item.factor[:, k : k + 1], item.right[k : k + 1]
            assert total.add(matrix(left), matrix(right), float(item.scale[k]), memory)
        if item.magnitude is not None:
            assert total.rescale(matrix(item.magnitude[:, None]), memory)
        sums.append((item.site, total))
    return lambda task: PassedRows(task, sums, Memory())


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from(sorted(SITES)), st.integers(1, 9), st.integers(0, 99), st.booleans(),
    st.sampled_from(["full", "sample", "off"]),
)  # fmt: skip
def test_it_writes_and_measures_what_rows_in_memory_do(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, sites: str, rank: int, seed: int, dora: bool, retention: str
) -> None:
    folder = tmp_path_factory.mktemp("passed")
    spec = cases.save(folder / "W", dtype, seed)
    items = cases.products(sites, rank, seed, dora)
    for item in items:
        if item.magnitude is not None:
            item.magnitude[:] = item.magnitude.astype(np.float32)  # as it would be stored
    for tile in TILES:

        def in_memory(task: TensorTask) -> InMemory:
            return InMemory(task, NativeRows(task, items, floats.Buffers()))

        wanted, theirs = cases.write(spec, in_memory, folder / "out", tile, retention=retention)
        made, ours = cases.write(spec, passed(items), folder / "passed", tile, retention=retention)
        assert made == wanted
        assert ours.digests == theirs.digests
        assert (ours.retained, ours.total, ours.changed) == pytest.approx(
            (theirs.retained, theirs.total, theirs.changed), rel=1e-12
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (12, 30)])
def test_infinities_are_refused_wherever_they_are(tmp_path: Path, dtype: str, place: tuple[int, int]) -> None:
    spec = cases.save(tmp_path / "W", dtype, seed=1)
    raw = np.fromfile(spec.file, floats.unsigned(dtype)).reshape(MATRIX)
    raw[place] = floats.INFINITY[dtype]
    raw.tofile(spec.file)
    with pytest.raises(IncompatibleAdapter, match=f"W: the merged values are not finite in {dtype}"):
        cases.write(spec, passed(cases.products("one part", 3, 1)), tmp_path / "out", 400)


def test_a_row_without_direction_is_named(tmp_path: Path) -> None:
    spec = cases.save(tmp_path / "W", "BF16", seed=1)
    raw = np.fromfile(spec.file, np.uint16).reshape(MATRIX)
    raw[9 + 7] = 0
    raw.tofile(spec.file)
    items = cases.products("one part", 3, 1, dora=True)
    items[0].factor[7] = 0
    with pytest.raises(IncompatibleAdapter, match="zero in all of output feature 7"):
        cases.write(spec, passed(items), tmp_path / "out", 400)


def test_a_file_that_became_shorter_is_a_sentence(tmp_path: Path) -> None:
    spec = cases.save(tmp_path / "W", "F16", seed=1)
    spec.file.write_bytes(spec.file.read_bytes()[:1000])
    with pytest.raises(BadFile, match=r"W: became shorter while it was read \(ends at byte 1000\)"):
        cases.write(spec, passed([cases.product(WHOLE, 2, 1)]), tmp_path / "out")


def test_it_stops_between_tiles(tmp_path: Path) -> None:
    spec, written = cases.save(tmp_path / "W", "F16", seed=1), list[int]()
    with (tmp_path / "out").open("wb") as target:
        task = TensorTask("W", spec, MATRIX, "F16", target.fileno(), 0)
        with pytest.raises(InterruptedError):
            run(task, passed([cases.product(WHOLE, 2, 1)])(task), written.append, lambda: len(written) == 2, 400)
    assert len(written) == 2
