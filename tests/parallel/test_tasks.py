"""Tasks run on any executor; the first error ends all, and a worker that is lost is named."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from loratools.decisions import warnings_to
from loratools.errors import BadFile, LoraToolsError
from loratools.parallel.executors._pool import Pool
from loratools.parallel.tasks import TRIES, place, run


class Gone(Exception):
    """What an executor here says of a worker that is lost."""


class Losing(Executor):
    """An executor that loses the worker of each task so many times before it does it."""

    def __init__(self, times: int) -> None:
        self.times, self.begun = times, dict[Any, int]()

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.begun[args[0]] = self.begun.get(args[0], 0) + 1
        if self.begun[args[0]] <= self.times:
            future.set_exception(Gone("the worker is gone"))
        else:
            future.set_result(work(*args))
        return future


def double(number: int) -> int:
    if number < 0:
        raise BadFile(f"{number}: below zero")
    return 2 * number


def killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_the_order_of_the_tasks() -> None:
    came = []
    with ThreadPoolExecutor(3) as executor:
        results = run(
            Pool(executor, "threads"), double, range(9), lambda task, result: came.append((task, result)), bool
        )
    assert results == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert sorted(came) == [(i, 2 * i) for i in range(9)]


def test_the_error_of_a_task_is_raised() -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(BadFile, match="-1: below zero"):
        run(Pool(executor, "threads"), double, [1, -1, 2], lambda task, result: None, bool)


@pytest.mark.parametrize("times", range(TRIES))
def test_a_task_whose_worker_is_lost_is_begun_again(times: int) -> None:
    executor = Losing(times)
    said: list[str] = []
    with warnings_to(said.append):
        assert run(Pool(executor, "them", lost=(Gone,)), double, [4], lambda task, result: None, bool) == [8]
    assert executor.begun == {4: times + 1}
    assert said == ["them: the worker of 4 was lost; it is done again"] * times


def test_a_task_that_loses_every_worker_is_given_up() -> None:
    with warnings_to(lambda text: None), pytest.raises(LoraToolsError, match="them: 4 was not done: Gone"):
        run(Pool(Losing(TRIES), "them", lost=(Gone,)), double, [4], lambda task, result: None, bool)


@pytest.mark.slow
def test_a_pool_whose_process_is_killed_is_told_in_a_sentence() -> None:
    told = "processes: 1 was not done: BrokenProcessPool"
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor,
        pytest.raises(LoraToolsError, match=told),
    ):
        run(Pool(executor, "processes"), killed, [1], lambda task, result: None, bool)


def test_a_place_names_the_process() -> None:
    assert place().endswith(f", process {os.getpid()}")
