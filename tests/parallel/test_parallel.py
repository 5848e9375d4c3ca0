"""Threads: results in order, all problems at once, nothing begun after a failure, torch's own number restored."""

from __future__ import annotations

import os
import subprocess
import sys
from contextvars import ContextVar
from threading import Barrier, Event, get_ident

import pytest

from loratools.errors import BadFile, LoraToolsError
from loratools.parallel import cores, each, side_by_side, workers
from tests.conftest import clean_env


def test_results_keep_the_order_of_the_items_however_they_end() -> None:
    second_done = Event()

    def work(name: str, number: int) -> int:
        if name == "first":
            assert second_done.wait(60)
        else:
            second_done.set()
        return number * number

    results = each(work, {"first": 3, "second": 4}, 2)
    assert list(results.items()) == [("first", 9), ("second", 16)]


def test_every_problem_is_in_one_error() -> None:
    def work(name: str, number: int) -> int:
        if number % 2:
            raise (ValueError if number == 1 else LoraToolsError)(f"{number} is odd")
        return number

    with pytest.raises(BadFile, match="2 are odd") as caught:
        each(
            work,
            dict(zip("abcd", range(4), strict=True)),
            2,
            refuse=lambda lines: BadFile(f"{len(lines)} are odd", lines),
        )
    assert caught.value.problems == ("b: 1 is odd", "d: 3 is odd")


def test_side_by_side_all_run_at_once_and_the_last_in_this_thread() -> None:
    met, context = Barrier(3), ContextVar("context", default=0)
    context.set(7)

    def work(number: int) -> tuple[int, int, int]:
        met.wait(60)  # no one ends before all have begun
        return number * number, context.get(), get_ident()

    done = side_by_side(work, [3, 4, 5])
    assert [result[:2] for result in done] == [(9, 7), (16, 7), (25, 7)]
    assert [thread == get_ident() for *_, thread in done] == [False, False, True]
    assert side_by_side(work, []) == []


@pytest.mark.parametrize("bad", [[0], [2], [0, 2]])
def test_side_by_side_the_first_error_is_raised_when_all_have_ended(bad: list[int]) -> None:
    ended = []

    def work(number: int) -> None:
        if number in bad:
            raise ValueError(number)
        ended.append(number)

    with pytest.raises(ValueError, match=str(bad[0])):
        side_by_side(work, [0, 1, 2])
    assert sorted(ended) == sorted({0, 1, 2} - set(bad))


def test_after_a_failure_nothing_more_begins() -> None:
    gate = Event()
    with pytest.raises(ZeroDivisionError), workers(1) as pool:  # noqa: PT012
        pool.submit(gate.wait, 60)
        waiting = [pool.submit(get_ident) for _ in range(3)]
        waiting[-1].add_done_callback(lambda _: gate.set())
        raise ZeroDivisionError
    assert all(task.cancelled() for task in waiting)


def test_without_refuse_an_error_is_raised_as_it_is() -> None:
    def work(_: str, number: int) -> float:
        return 1 / number if number else float("x")

    with pytest.raises(ValueError, match="could not convert"):
        each(work, {"a": 1, "b": 0}, 1)


def test_workers_compute_on_the_threads_of_torch_that_were_asked_for() -> None:
    import torch

    before = torch.get_num_threads()
    numbers = each(
        lambda _key, _item: (get_ident(), torch.get_num_threads()), dict.fromkeys(range(8)), 2, torch_threads=1
    )
    assert {number for _, number in numbers.values()} == {1}
    assert get_ident() not in {thread for thread, _ in numbers.values()}
    assert torch.get_num_threads() == before


def test_without_torch_threads_torch_is_not_imported() -> None:
    program = "import sys; from loratools.parallel import each; each(max, {1: 2}, 1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean_env())
    assert done.stdout == "False\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can keep a process to some cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    program = (
        "import os; from loratools.parallel import cores; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "print(cores())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean_env())
    assert done.stdout == "1\n"
    assert cores() == len(os.sched_getaffinity(0))
