"""The tile loop with an arithmetic of its own: what is read, hashed, written and counted, tile by tile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loratools.engine.task import Changed, TensorResult, TensorTask
from loratools.engine.tensor import InMemory
from loratools.engine.tensor import run as run_tiling
from loratools.parallel import Progress
from loratools.storage import digest
from loratools.storage.header import TensorSpec

ROWS, COLUMNS = 50, 30
BYTES = bytes(range(256)) * (ROWS * COLUMNS * 2 // 256 + 1)


class Doubling:
    """Writes each 16-bit number twice, as if it became one of 32 bits, and keeps what it was given."""

    def __init__(self, together: int = 1, needs_pass: bool = False) -> None:
        self.together, self.needs_pass = together, needs_pass
        self.seen: list[tuple[str, int, int, int]] = []

    def room(self, rows: int) -> memoryview:
        return memoryview(bytearray(rows * COLUMNS * 2))

    def observe(self, stored: memoryview, first: int) -> None:
        self.seen.append(("observe", first, len(stored) // 2 // COLUMNS, 0))

    def change(self, stored: memoryview, first: int, measured: int) -> Changed:
        self.seen.append(("change", first, len(stored) // 2 // COLUMNS, measured))
        raw = bytes(stored)
        doubled = b"".join(raw[i : i + 2] * 2 for i in range(0, len(raw), 2))
        return Changed(memoryview(doubled), 1.0 * measured, 2.0 * measured, 3.0 * measured)


def run(
    task: TensorTask, arithmetic: Doubling, progress: Progress, stopped: Callable[[], bool], tile: int = 1 << 20
) -> TensorResult:
    """Write the tensor by this arithmetic."""
    return run_tiling(task, InMemory(task, arithmetic), progress, stopped, tile)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def task(folder: Path, target: int, retention: str = "full", rows: int = ROWS) -> TensorTask:
    (folder / "in").write_bytes(b"header" + BYTES[: rows * COLUMNS * 2] + b"more")
    spec = TensorSpec("BF16", (rows, COLUMNS), folder / "in", 6, 6 + rows * COLUMNS * 2)
    return TensorTask("W", spec, (rows, COLUMNS), "F32", target, 11, ["blake3", "sha256"], retention)


@pytest.mark.parametrize(
    ("tile", "together", "step"), [(1, 1, 1), (1000, 1, 8), (1000, 3, 6), (1, 7, 7), (1 << 20, 4, 48)]
)
def test_tiles_are_cut_at_whole_rows(tmp_path: Path, target: int, tile: int, together: int, step: int) -> None:
    """By the wider of both dtypes: 120 bytes a row."""
    arithmetic, written = Doubling(together), list[int]()
    result = run(task(tmp_path, target), arithmetic, written.append, lambda: False, tile)
    starts = range(0, ROWS, step)
    assert arithmetic.seen == [("change", at, min(step, ROWS - at), min(step, ROWS - at)) for at in starts]
    data = BYTES[: ROWS * COLUMNS * 2]
    doubled = b"".join(data[i : i + 2] * 2 for i in range(0, len(data), 2))
    assert (tmp_path / "out").read_bytes() == bytes(11) + doubled
    assert sum(written) == len(doubled)
    assert (result.retained, result.total, result.changed) == (ROWS, 2 * ROWS, 3 * ROWS)


def test_digests_are_those_of_the_source(tmp_path: Path, target: int) -> None:
    result = run(task(tmp_path, target), Doubling(), lambda _: None, lambda: False, 500)
    for name in ("blake3", "sha256"):
        hasher = digest.start_tensor("BF16", (ROWS, COLUMNS), name)
        hasher.update(memoryview(BYTES[: ROWS * COLUMNS * 2]))
        assert result.digests[name] == digest.finish(hasher, name)


def test_a_sample_is_scaled_up_to_the_tensor(tmp_path: Path, target: int) -> None:
    arithmetic = Doubling()
    result = run(task(tmp_path, target, "sample"), arithmetic, lambda _: None, lambda: False, 600)
    measured = [rows for _, _, rows, count in arithmetic.seen if count]
    assert len(measured) == 1
    assert result.total == pytest.approx(2 * ROWS)
    off = run(task(tmp_path, target, "off"), Doubling(), lambda _: None, lambda: False, 600)
    assert (off.retained, off.total, off.changed) == (0, 0, 0)


def test_a_pass_comes_before_the_first_change(tmp_path: Path, target: int) -> None:
    arithmetic = Doubling(needs_pass=True)
    run(task(tmp_path, target), arithmetic, lambda _: None, lambda: False, 20 * 120)
    kinds = [(kind, first) for kind, first, _, _ in arithmetic.seen]
    assert kinds == [(kind, first) for kind in ("observe", "change") for first in (0, 20, 40)]


def test_a_tensor_without_rows_is_hashed_and_nothing_else(tmp_path: Path, target: int) -> None:
    arithmetic = Doubling()
    result = run(task(tmp_path, target, rows=0), arithmetic, lambda _: None, lambda: False)
    assert arithmetic.seen == []
    assert result.digests.keys() == {"blake3", "sha256"}
    assert result.total == 0


def test_it_stops_between_tiles(tmp_path: Path, target: int) -> None:
    arithmetic = Doubling()
    with pytest.raises(InterruptedError):
        run(task(tmp_path, target), arithmetic, lambda _: None, lambda: len(arithmetic.seen) == 2, 120)
    assert len(arithmetic.seen) == 2
