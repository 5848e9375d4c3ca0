"""Work that is shared: between threads, here, and between processes and machines.

Here: how many cores there are, pools of threads that stop at the first failure, and progress. Beyond one process the
seam is `concurrent.futures.Executor`. A task is a plain function of a module and a value of paths and numbers, so that
it travels; every worker plans anew from the headers, and shows by a fingerprint that it has the same plan.

    memory     memory of a thread that files are read into
    plain      values of loratools as JSON has them, and back
    call       a verb and its arguments, as plain data
    shares     parts of a whole, counted from 1, of about equal size
    shared     where a verb lets others share its work
    executors  what runs tasks, one file for each kind of address
    tasks      run tasks on an executor, and end all of them at the first error
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, TypeVar, cast

from loratools.errors import LoraToolsError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Progress = Callable[[int], None]
"""Takes the number of bytes done since its last call, from any thread."""

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(threads: int, torch_threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of `threads` threads; when the block raises, tasks that have not begun are cancelled.

    With `torch_threads` each of them computes on so many threads of torch; without, torch is left alone (and is not
    imported). Torch's own number is restored at the end.
    """
    from concurrent.futures import ThreadPoolExecutor

    start = restore = None
    if torch_threads:
        import torch

        start = partial(torch.set_num_threads, torch_threads)
        restore = partial(torch.set_num_threads, torch.get_num_threads())
    try:
        with ThreadPoolExecutor(threads, initializer=start) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        if restore:
            restore()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let this thread compute on one thread of torch: over small matrices more of them wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let NumPy's BLAS compute on one thread in each of ours: its own wait for each other, and spin meanwhile."""
    import numpy  # noqa: F401  # what is not loaded yet cannot be told
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def each(
    work: Callable[[Key, Item], Result], items: Mapping[Key, Item], threads: int, *, torch_threads: int | None = None,
    refuse: Callable[[Sequence[str]], LoraToolsError] | None = None,
) -> dict[Key, Result]:  # fmt: skip
    """Return key -> work(key, item), in the order of `items`, which is the order in which the work begins.

    `threads` and `torch_threads` are those of `workers`. The first exception ends the work. With `refuse` every
    `LoraToolsError` and `ValueError` is waited for instead, and `refuse` makes one error of them: a line for each key.
    """
    results: dict[Key, Result] = {}
    problems = []
    with workers(threads, torch_threads) as pool:
        futures = {key: pool.submit(work, key, item) for key, item in items.items()}
        for key, future in futures.items():
            try:
                results[key] = future.result()
            except (LoraToolsError, ValueError) as error:
                if refuse is None:
                    raise
                problems.append(f"{key}: {error}")
    if refuse and problems:
        raise refuse(problems)
    return results


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return work(item) for each, in order, all at once: the last in this thread, each other in one of its own.

    For few items, in a command that is short: importing `concurrent.futures` takes it a tenth of its time. When all
    have ended, the first exception is raised.
    """
    done: list[Result | BaseException | None] = [None] * len(items)

    def run(number: int) -> None:
        try:
            done[number] = work(items[number])
        except BaseException as error:  # raised below, in the thread that asked
            done[number] = error

    others = [Thread(target=copy_context().run, args=(run, number)) for number in range(len(items) - 1)]
    for thread in others:
        thread.start()
    if items:
        run(len(items) - 1)
    for thread in others:
        thread.join()
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return cast("list[Result]", done)


def no_progress(count: int) -> None:
    """Take the number of bytes done, and tell nobody."""
