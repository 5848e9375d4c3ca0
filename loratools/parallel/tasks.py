"""Run tasks on an executor: in any order, each again whose worker is lost, and all of them end at the first error."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Generic, TypeVar

from loratools.decisions import warned
from loratools.errors import LoraToolsError
from loratools.parallel.executors._pool import Pool

Task = TypeVar("Task")
Result = TypeVar("Result")

TRIES = 3
"""How often a task is begun whose worker is lost."""

PATIENCE = 20
"""Seconds that tasks have to end which have begun when the work ends early."""

GLANCE = 5
"""Seconds without news after which it is asked whether there is a worker at all."""


AHEAD = 64
"""Results for each worker that may wait for an earlier one, where they are given back in order."""

_MANY = 16


def place() -> str:
    """Return where a task runs: the machine's name, and the number of the process."""
    return f"{platform.node() or 'a machine without a name'}, process {os.getpid()}"


def run(
    pool: Pool, work: Callable[[Task], Result], tasks: Sequence[Task], done: Callable[[Task, Result], None],
    stop: Callable[[], None],
) -> list[Result]:  # fmt: skip
    """Return `work(task)` of each task, in the order of the tasks, which is the order in which they are begun.

    Args:
        pool: Who does the work.
        work: A function at the top of a module, which every worker can import.
        tasks: Values that pickle.
        done: Called with each task and its result as it comes.
        stop: Called when the work ends early: tells tasks that have begun to end, which an executor cannot.

    Raises:
        LoraToolsError: What a task raised; workers were lost with the same task again and again; none is left.
    """
    going, results = _Going(pool, work, tasks), dict[int, Result]()
    try:
        for number in range(len(tasks)):
            going.begin(number)
        while going.waiting:
            for number, result in going.ended():
                results[number] = result
                done(tasks[number], result)
    except BaseException:
        stop()
        going.cancel()
        wait(going.waiting, timeout=PATIENCE)
        raise
    return [results[number] for number in sorted(results)]


def in_order(
    pool: Pool, work: Callable[[Task], Result], tasks: Sequence[Task], after: Mapping[int, Sequence[int]],
    lost: Callable[[Task, str], Result],
) -> Iterator[Result]:  # fmt: skip
    """Yield `work(task)` of each task, in their order.

    Args:
        pool: Who does the work.
        work: A function that pickles.
        tasks: Values that pickle.
        after: By the number of a task, those that must be done before it begins.
        lost: Makes the result of a task that was the end of several workers, of it and of that in words.

    Raises:
        LoraToolsError: What a task raised; no worker is left; the executor does no more.
    """
    going, results = _Going(pool, work, tasks), dict[int, Result]()
    ended, todo, given = set[int](), list(range(len(tasks))), 0
    try:
        while given < len(tasks):
            near = [number for number in todo if number < given + AHEAD * (pool.count or _MANY)]
            for number in near:
                if ended.issuperset(after.get(number, ())):
                    todo.remove(number)
                    going.begin(number)
            for number, result in going.ended(lost):
                results[number] = result
                ended.add(number)
            while given in results:
                yield results.pop(given)
                given += 1
    finally:
        going.cancel()


class _Going(Generic[Task, Result]):
    """Tasks that have begun; each is begun again whose worker is lost."""

    def __init__(self, pool: Pool, work: Callable[[Task], Result], tasks: Sequence[Task]) -> None:
        self._pool, self._work, self._tasks = pool, work, tasks
        self._tries: Counter[int] = Counter()
        self.waiting: dict[Future[Result], int] = {}

    def begin(self, number: int) -> None:
        """Begin a task."""
        self._tries[number] += 1
        self.waiting[self._pool.executor.submit(self._work, self._tasks[number])] = number

    def ended(self, lost: Callable[[Task, str], Result] | None = None) -> Iterator[tuple[int, Result]]:
        """Wait until something ends; yield the number of each task that has, and its result.

        `lost` makes the result of a task that was the end of several workers; without, that is an error.
        """
        pool, tasks = self._pool, self._tasks
        finished, _ = wait(self.waiting, GLANCE, FIRST_COMPLETED)
        if not finished and (gone := pool.nobody()):
            raise _lost(pool, tasks[min(self.waiting.values())], gone)
        for future in finished:
            number = self.waiting.pop(future)
            try:
                result = future.result()
            except BaseException as error:
                why = _given_up(pool, error, self._tries[number])
                if not why:
                    if lost is None:
                        warned("%s: the worker of %s was lost; it is done again", pool.name, tasks[number])
                    self.begin(number)
                    continue
                if lost is None or not isinstance(error, pool.killed):
                    raise _lost(pool, tasks[number], why) from None
                result = lost(tasks[number], why)
            yield number, result

    def cancel(self) -> None:
        """Call off what has not begun."""
        for future in self.waiting:
            future.cancel()


def _given_up(pool: Pool, error: BaseException, tries: int) -> str | None:
    """Return in words why a task is not begun again after an error, None where it is; raise an error of its own."""
    if final := pool.final(error):
        return final
    if not isinstance(error, pool.lost):
        raise error
    return f"{type(error).__name__}: {error}" if tries == TRIES else None


def _lost(pool: Pool, task: object, why: str) -> LoraToolsError:
    hint = "A process may have been ended for want of memory; look at the log of the worker or the scheduler."
    return LoraToolsError(f"{pool.name}: {task} was not done: {why}", hint=hint)
