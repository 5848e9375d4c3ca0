"""The one who calls a verb on workers: divides its items, hands the parts out, and goes on with their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratools.decisions import decided, warned
from loratools.errors import counted
from loratools.parallel import Progress, cores, no_progress, shared, tasks
from loratools.parallel.call import Call
from loratools.parallel.executors import Workers, check, opened
from loratools.parallel.executors._pool import Pool
from loratools.parallel.shares import Part, balanced
from loratools.storage import atomic
from loratools.storage.atomic import machine
from loratools.storage.sources import session
from loratools.surgery.sharing import verbs
from loratools.surgery.sharing.task import Done, Task, do, key_of, stamps

EACH = 2
"""Parts for each worker: what one has done early, another has not to wait for."""

_SOME = 16
"""Workers that are reckoned with where their number may change."""


@dataclass(slots=True)
class Caller:
    """Hands parts of a call out to workers; `stack` ends with the verb, and with it the folder for what they write."""

    call: Call
    workers: Workers
    progress: Progress
    stack: ExitStack
    number: int | None = None

    def share(self, work: shared.Work, items: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Have all items done by workers."""
        if len(items) < 2:
            return work(items)
        with opened(self.workers) as pool:
            of = min(len(items), EACH * (pool.count or _SOME))
            decided("%s in %d parts on %s", counted(len(items), "tensor"), of, pool.name)
            return self._done(pool, of, sizes)

    def room(self) -> Path | None:
        """Return None: the caller writes the output."""

    def agreed(self, value: int) -> int:
        """Return the number, and keep it for the workers."""
        self.number = value
        return value

    def _done(self, pool: Pool, of: int, sizes: Mapping[str, int]) -> dict[str, Any]:
        verb, call, room = verbs.verb(self.call.verb), self.call, None
        if pool.local and pool.count and call.arguments.get("threads") is None:
            call = replace(call, arguments={**call.arguments, "threads": max(1, cores() // pool.count)})
        if verb.output:
            room = self._room(Path(call.arguments["output"]))
        key, known, arithmetic = key_of(sizes), stamps(), verb.arithmetic()
        parts = balanced(sizes, of)

        def done(task: Task, finished: Done) -> None:
            self.progress(sum(sizes[name] for name in parts[task.part.number - 1]))
            for warning in finished.warnings:
                warned("%s", warning)

        todo = [
            Task(call, Part(number, of), key, known, arithmetic, None if room is None else str(room), self.number)
            for number in range(1, of + 1)
        ]
        stop = partial(atomic.remove, room) if room else _nothing
        results = tasks.run(pool, do, todo, done, stop)
        return {name: result for each in results for name, result in each.results.items()}

    def _room(self, output: Path) -> Path:
        """Make the folder beside the output that workers write into; it goes when the verb ends."""
        room = self.stack.enter_context(atomic.part_folder(output, machine.token()))
        self.stack.callback(atomic.remove, room)
        return room


def _nothing() -> None:
    """Tell nobody: a verb that writes nothing has nothing to stop but its tasks."""


@contextmanager
def crew(
    name: str, arguments: Mapping[str, Any], workers: Workers | None, progress: Progress | None = None
) -> Iterator[None]:
    """Have the verb that is called in the block share its work with workers; without `workers` it does all itself.

    Args:
        name: The verb, as its command is called.
        arguments: Those of its function, which workers call it with.
        workers: Who does it: as for `merge_shared`. Default: nobody but this process.
        progress: Called with the work of each part that is done. Default: nobody is told.

    Raises:
        LoraToolsError: What `share` raises.

    Example:
        >>> with crew("hash", {"checkpoint": "base"}, None):
        ...     pass
    """
    if workers is None:
        yield
        return
    check(workers)
    if verbs.verb(name).output:
        atomic.afar.refuse_afar(Path(arguments["output"]), "work that is shared out")
    with ExitStack() as stack, shared.by(
        Caller(verbs.call_of(name, arguments), workers, progress or no_progress, stack)
    ):  # fmt: skip
        yield


@session()
def share(name: str, workers: Workers, *, progress: Progress | None = None, **arguments: Any) -> Any:
    """Run a verb on several processes or machines, and return what it returns; the result is that of one process.

    Args:
        name: The verb, as its command is called: one of `VERBS`, such as `"extract-svd"`.
        workers: Who does it: a number of processes of this machine, the address of a Dask scheduler
            (`"tcp://host:8786"`), `"slurm"`, or a `concurrent.futures.Executor`. They see the same folders.
        progress: Called with the work of each part that is done. Default: nobody is told.
        arguments: Those of the verb's function. Inputs are paths or references.

    Raises:
        InvalidOption: There is no such verb, or an argument is held in memory.
        LoraToolsError: Whatever the verb raises; workers that compute otherwise, or are lost again and again.

    Example:
        >>> share("hash", 2, checkpoint="base", tiers="root").root  # doctest: +SKIP
        'blake3:6e1f…'
    """
    with crew(name, arguments, workers, progress):
        return verbs.verb(name).load()(**arguments, progress=progress)
