"""A file that is read by ranges: each byte is asked for once, some are on their way, and memory has an end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from loratools.errors import BadFile, StoreError
from loratools.storage import files, resolvers, sources
from loratools.storage.stores import ranges
from loratools.storage.stores.ranges import Ranges

DATA = random.Random(0).randbytes(300_000)
CUTS = [0, 10_000, 10_100, 10_200, 50_000, 200_000, 200_010]


class Far:
    """A file of `DATA` whose first bytes are here, and what was fetched of it."""

    def __init__(self, path: Path, here: int) -> None:
        path.write_bytes(DATA[:here] + bytes(len(DATA) - here))
        self.path, self.asked, self.fails, self._lock = path, Counter[tuple[int, int]](), 0, Lock()
        self.ranges = Ranges(path, len(DATA), here, CUTS, self._fetch, "data")
        resolvers.FAR[str(path)] = self.ranges

    def _fetch(self, start: int, stop: int) -> memoryview:
        with self._lock:
            self.asked[start, stop] += 1
            if self.fails:
                self.fails -= 1
                raise StoreError("no")
        return memoryview(DATA)[start:stop]


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setattr(ranges, "SEGMENT", 16_000)
    monkeypatch.setattr(ranges, "TINY", 1_000)
    monkeypatch.setattr(ranges, "HELD", 6)
    yield Far(tmp_path / "far", 5_000)
    resolvers.forget(tmp_path)
    assert not ranges._CACHE._held
    assert not resolvers.FAR


def _read(far: Far, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    with files.descriptor(far.path) as source:
        files.read_into(source, memoryview(buffer), start, far.path)
    return bytes(buffer)


def test_it_is_cut_where_tensors_begin_and_tiny_ones_stay_together(far: Far) -> None:
    assert _read(far, 0, len(DATA)) == DATA
    bounds = sorted({edge for pair in far.asked for edge in pair})
    assert bounds[0] == 5_000, "what is here is not fetched"
    assert {10_000, 10_200, 50_000, 200_000, 200_010} < set(bounds)
    assert 10_100 not in bounds
    assert all(stop - start <= 16_000 for start, stop in far.asked)
    assert far.asked.total() == len(far.asked), "no range is asked for twice"
    assert sum(stop - start for start, stop in far.asked) == len(DATA) - 5_000


def test_tiles_that_are_read_in_order_by_several_threads_are_fetched_once(far: Far) -> None:
    def tensor(pair: tuple[int, int]) -> bytes:
        return b"".join(_read(far, at, min(at + 1_000, pair[1])) for at in range(*pair, 1_000))

    pairs = [(50_000, 200_000), (200_010, 300_000), (10_200, 50_000)]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(tensor, pairs)] == [DATA[start:stop] for start, stop in pairs]
    assert far.asked.total() == len(far.asked) == 10 + 7 + 3
    assert len(ranges._CACHE._held) <= 6, "memory has an end"


def test_what_is_read_again_is_fetched_again_when_it_had_to_go(far: Far) -> None:
    assert _read(far, 0, 300_000) == _read(far, 0, 300_000) == DATA
    assert 1 < max(far.asked.values()) <= 2


def test_a_copy_tells_what_comes_next(far: Far, tmp_path: Path) -> None:
    with files.descriptor(far.path) as source, (tmp_path / "copy").open("wb") as target:
        files.copy_range(source, 6_000, 290_000, target.fileno(), 0, far.path)
    assert (tmp_path / "copy").read_bytes() == DATA[6_000:290_000]


def test_a_descriptor_of_it_cannot_be_read_by_anything_else(far: Far) -> None:
    with files.descriptor(far.path) as source, pytest.raises(OSError, match="Bad file descriptor"):
        __import__("os").pread(source, 10, 20_000)


def test_it_opens_as_a_file(far: Far) -> None:
    with sources.open_file(far.path) as file:
        assert file.read(6_000) == DATA[:6_000]
        assert file.seek(-10, 2) == len(DATA) - 10
        assert file.read() == DATA[-10:]
        assert file.read(1) == b""
        file.seek(9_990)
        assert file.read(300) == DATA[9_990:10_290]


def test_the_end_of_the_file_is_an_error(far: Far) -> None:
    with pytest.raises(BadFile, match=r"far: ends at byte 300000, and was to be read to 300001$"):
        _read(far, 299_000, 300_001)


def test_what_fails_is_said_and_may_be_asked_for_again(far: Far) -> None:
    far.fails = 1
    with pytest.raises(StoreError, match=r"^no$"):
        _read(far, 10_000, 10_050)
    assert _read(far, 10_000, 10_050) == DATA[10_000:10_050]
