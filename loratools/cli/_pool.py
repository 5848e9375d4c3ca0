"""Work on many items in processes of its own, given back in the order of the items.

Reading headers is work of Python's own, which threads do not share out. Each process works on one item at a time; one
that ends by itself (killed for its memory, say) costs its item and is replaced. What ends this process ends them.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from loratools.cli._signals import Handlers

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 64
"""Results for each process that may wait for an earlier one."""


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, after: Mapping[int, Sequence[int]],
    lost: Callable[[Item, int | None], Result],
) -> Iterator[Result]:  # fmt: skip
    """Yield work(item) for each item, in their order, from `jobs` processes.

    `work`, items and results are pickled. `after` has, by its number, the items that must be done before one begins.
    `lost` makes the result of an item whose process ended, of it and of the exit code.
    """
    workers = [_Worker(work) for _ in range(min(jobs, len(items)))]
    results: dict[int, Result] = {}
    begun = given = 0
    try:
        while given < len(items):
            for number, worker in enumerate(workers):
                running = {each.index for each in workers if each.index is not None}
                held = begun < len(items) and not running.isdisjoint(after.get(begun, ()))
                if worker.index is None and not held and begun < min(len(items), given + _AHEAD * jobs):
                    if not worker.begin(begun, items[begun]):
                        workers[number] = _Worker(work)  # it ended while it had nothing to do
                        continue
                    begun += 1
            if given not in results:
                busy = [worker for worker in workers if worker.index is not None]
                ready = wait([worker.pipe for worker in busy])
                for worker in [worker for worker in busy if worker.pipe in ready]:
                    index = worker.index
                    assert index is not None
                    try:
                        results[index] = worker.end()
                    except EOFError:
                        results[index] = lost(items[index], worker.exit_code())
                        workers[workers.index(worker)] = _Worker(work)
            while given in results:
                yield results.pop(given)
                given += 1
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.exit_code()


class _Worker(Generic[Item, Result]):
    """A process, the pipe to it, and the number of the item that it works on."""

    def __init__(self, work: Callable[[Item], Result]) -> None:
        context = _context()
        self.pipe, other = context.Pipe()
        self.index: int | None = None
        self._process = context.Process(target=_serve, args=(work, other), daemon=True)
        self._process.start()
        other.close()

    def begin(self, index: int, item: Item) -> bool:
        """Hand an item over; False where the process has ended."""
        try:
            self.pipe.send(item)
        except OSError:
            return False
        self.index = index
        return True

    def end(self) -> Result:
        """Return the result; raise `EOFError` where the process has ended."""
        try:
            result: Result = self.pipe.recv()
        except OSError:
            raise EOFError from None
        self.index = None
        return result

    def exit_code(self) -> int | None:
        """Wait for the end of the process, and return how it ended: minus the number of a signal."""
        self._process.join()
        code: int | None = self._process.exitcode
        return code

    def stop(self) -> None:
        """Ask the process to end: at once where it works, which tidies up."""
        if self.index is not None:
            self._process.terminate()
            return
        with suppress(OSError):  # it has ended
            self.pipe.send(None)  # closing is not enough: processes that began later have the pipe, too


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """Work on what comes through the pipe, until that is None, or its other end is closed, or a signal comes."""
    with suppress(KeyboardInterrupt, EOFError, OSError), Handlers():
        while (item := pipe.recv()) is not None:
            pipe.send(work(item))


def _context() -> Any:
    """Return how processes are begun: as copies of this one, where no thread or library of threads forbids it."""
    alone = threading.active_count() == 1 and not {"torch", "obstore"} & sys.modules.keys()
    forks = sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("fork" if forks and alone else "spawn")
