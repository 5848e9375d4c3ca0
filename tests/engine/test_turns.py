"""The queue of a merge: everything is done once, in order within a file, and workers keep apart where they can."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import pytest

from loratools.engine.turns import Queue, Turns

ITEMS = [(file, f"{file}{number}") for file in (3, 5, 8) for number in range(40)]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("alone", [True, False])
def test_every_item_is_done_once_and_begun_in_order_within_its_file(workers: int, alone: bool) -> None:
    turns, begun, lock = Turns(), dict[int, list[str]](), Lock()
    at_once = dict.fromkeys((3, 5, 8), 0)
    crowded = []

    def do(file: int, item: str) -> str:
        with lock:
            begun.setdefault(file, []).append(item)
            at_once[file] += 1
            crowded.append(at_once[file] > 1)
        sum(range(2000))  # long enough that threads meet
        with lock:
            at_once[file] -= 1
        return item

    with ThreadPoolExecutor(workers) as pool:
        futures = Queue(turns, ITEMS, alone=alone).start(pool, workers, do)
        done = [item for future in futures for item in future.result()]
    assert sorted(done) == sorted(item for _, item in ITEMS)
    if alone or workers == 1:
        assert begun == {file: [item for other, item in ITEMS if other == file] for file in (3, 5, 8)}
        assert not any(crowded)
    assert set(turns.busy.values()) == {0}


def test_two_workers_begin_with_two_files() -> None:
    both = Barrier(2, timeout=60)
    files = []

    def do(file: int, item: str) -> None:
        if len(files) < 2:
            files.append(file)
            both.wait()  # the other one has begun, too

    with ThreadPoolExecutor(2) as pool:
        for future in Queue(Turns(), ITEMS).start(pool, 2, do):
            future.result()
    assert len(set(files[:2])) == 2


def test_a_queue_is_finished_whoever_else_writes_to_its_files() -> None:
    turns, copied, entered, left = Turns(), [], Barrier(2, timeout=60), Barrier(2, timeout=60)

    def work(file: int, item: str) -> None:
        entered.wait()  # at the file before the first copy
        left.wait()  # and until the last

    def copy(file: int, item: str) -> None:
        if not copied:
            entered.wait()
        copied.append(item)
        if len(copied) == 40:
            left.wait()

    with ThreadPoolExecutor(2) as pool:
        work_queue = Queue(turns, [(3, "work")]).start(pool, 1, work)
        copies = Queue(turns, [(3, str(i)) for i in range(40)], alone=True).start(pool, 1, copy)
        for future in (*work_queue, *copies):
            future.result()
    assert copied == [str(i) for i in range(40)]


def test_after_an_error_nothing_is_begun() -> None:
    begun = []

    def do(file: int, item: str) -> None:
        begun.append(item)
        if len(begun) == 5:
            raise OSError("no space")

    with ThreadPoolExecutor(1) as pool:
        (future,) = Queue(Turns(), ITEMS).start(pool, 1, do)
        with pytest.raises(OSError, match="no space"):
            future.result()
    assert len(begun) == 5


def test_a_queue_that_is_ended_begins_no_further_item() -> None:
    begun = []

    def do(file: int, item: str) -> str:
        begun.append(item)
        if len(begun) == 5:
            queue.end()
        return item

    queue = Queue(Turns(), ITEMS)
    with ThreadPoolExecutor(1) as pool:
        (future,) = queue.start(pool, 1, do)
        assert future.result() == begun
    assert len(begun) == 5
