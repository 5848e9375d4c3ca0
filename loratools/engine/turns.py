"""Who writes where: two threads that write to one file wait for each other in the kernel, so each keeps to its own."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

Item = TypeVar("Item")
Result = TypeVar("Result")


class Turns:
    """How many workers write to each file now, by its descriptor; shared by all queues of a run."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.busy: Counter[int] = Counter()


class Queue(Generic[Item]):
    """Items of several files, done in their order within a file, each time from the file that fewest are writing to.

    With `alone` no two workers of this queue write to one file: for work that is all writing.
    """

    def __init__(self, turns: Turns, items: Iterable[tuple[int, Item]], *, alone: bool = False) -> None:
        self._turns, self._alone = turns, alone
        self._own: Counter[int] = Counter()
        self._left: dict[int, deque[Item]] = {}
        for file, item in items:
            self._left.setdefault(file, deque()).append(item)

    def start(self, pool: Executor, workers: int, do: Callable[[int, Item], Result]) -> Sequence[Future[list[Result]]]:
        """Let so many workers do the items; each future has the results of one. After an error none is begun."""
        return [pool.submit(self._work, do) for _ in range(workers)]

    def end(self) -> None:
        """Let no further item be begun."""
        with self._turns.lock:
            self._left.clear()

    def _work(self, do: Callable[[int, Item], Result]) -> list[Result]:
        done = []
        while taken := self._take():
            file, item = taken
            try:
                done.append(do(file, item))
            except BaseException:
                self.end()
                raise
            finally:
                with self._turns.lock:
                    self._turns.busy[file] -= 1
                    self._own[file] -= 1
        return done

    def _take(self) -> tuple[int, Item] | None:
        busy = self._turns.busy
        with self._turns.lock:
            # One that finds its files taken may leave: who is at a file stays until nothing is left of it.
            taken = {file for file in self._left if self._alone and self._own[file]}
            left = {file: items for file, items in self._left.items() if items and file not in taken}
            if not left:
                return None
            file = min(left, key=lambda file: (busy[file], -len(left[file])))
            busy[file] += 1
            self._own[file] += 1
            return file, left[file].popleft()
