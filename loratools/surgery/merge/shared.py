"""A merge on workers: each part is a task, and the one that called makes the output of them (`parts.py`)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratools.decisions import decided, warned, warnings_to
from loratools.errors import BadFile, LoraToolsError, OutputRefused, counted
from loratools.parallel import Progress, cores, no_progress, tasks
from loratools.parallel.call import Call
from loratools.parallel.executors import Workers, opened
from loratools.parallel.shares import Part
from loratools.storage import atomic
from loratools.storage.atomic import inputs, leftovers, machine
from loratools.storage.sources import session
from loratools.surgery.merge.parts import PartReport, finish, write_part
from loratools.surgery.merge.planned import Planned, decide_call
from loratools.surgery.merge.prepare import Merge
from loratools.surgery.merge.run import execute

EACH = 4
"""Parts for each worker: what one has done early, another has not to wait for, and little is lost with one."""

_SOME = 16
"""Workers that are reckoned with where their number may change."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One part of a merge, for a worker."""

    planned: Planned
    part: Part

    def __str__(self) -> str:
        return f"part {self.part}"


@session()
def merge_shared(call: Call, workers: Workers, *, progress: Progress | None = None) -> Any:
    """Merge as `merge` does, on several processes or machines; the bytes are those of one.

    Args:
        call: The merge, as `call_of` returns it.
        workers: Who does it: a number of processes of this machine, the address of a Dask scheduler
            (`"tcp://host:8786"`), `"slurm"`, or a `concurrent.futures.Executor`. Its workers see the same folders.
        progress: Called with the bytes written since the last call. Default: nobody is told.

    Raises:
        LoraToolsError: Whatever `merge` raises; workers that compute otherwise, or are lost again and again.

    Example:
        >>> call = call_of("base", ["adapter"], "merged")
        >>> merge_shared(call, 2).output  # doctest: +SKIP
        'merged'
    """
    output = Path(call.arguments["output"])
    atomic.afar.refuse_afar(output, "work that is shared out")
    atomic.sweep(output)
    prepared = decide_call(call)
    planned = Planned.of(call, prepared)
    atomic.check_space(output, sum(file.size for file in prepared.plan.files))
    progress = progress or no_progress

    def done(_: _Task, written: PartReport) -> None:
        progress(written.nbytes)
        for warning in written.warnings:
            warned("%s", warning)

    mark = _mark(output, planned.key)
    try:
        mark.mkdir(exist_ok=True)
        with opened(workers) as pool:
            if pool.local and pool.count and prepared.options.threads is None:
                alone = replace(call, arguments={**call.arguments, "threads": max(1, cores() // pool.count)})
                planned = replace(planned, call=alone)
            whole = EACH * (pool.count or _SOME)
            count = sum(map(bool, planned.parts(prepared, whole))) or 1
            files = counted(len(prepared.plan.files), "file")
            decided("%s in %d parts on %s", files, count, pool.name)
            todo = [_Task(planned, Part(number, count)) for number in range(1, count + 1)]
            written = tasks.run(pool, work, todo, done, partial(atomic.remove, mark))
        with _taken(output, [Path(each.folder) for each in written]) as folders:
            report = execute(prepared, parts=folders, room=mark)
        return finish(call, report)
    finally:
        _remove(output, planned.key)


def work(task: _Task) -> PartReport:
    """Write one part, in a worker; what it warns of comes back with the report."""
    warnings: list[str] = []
    planned = task.planned
    mark = _mark(Path(planned.call.arguments["output"]), planned.key)
    wanted = _while_wanted(mark)
    try:
        with warnings_to(warnings.append), session():
            planned.call.check_version()
            if not mark.exists():
                raise BadFile(
                    f"{tasks.place()} does not see {mark}, which the caller has made: it was called off, or that is "
                    "another folder there", hint="Every worker has to see the same folders under the same names.",
                )  # fmt: skip
            prepared, token = _again(planned), f"{planned.key[:4]}{task.part.number:04x}"
            # The machine is in the name: on a server's folder its locks are seen here alone.
            own, beside = f"{token}{machine.mark()}", f"{token}{secrets.token_hex(2)}{machine.mark()}"
            try:
                report = write_part(planned, prepared, task.part, own, wanted, mark, durable=False)
            except OutputRefused:  # a worker that was given up still holds it: begin beside it, with the same bytes
                report = write_part(planned, prepared, task.part, beside, wanted, mark, durable=False)
            if not mark.exists():  # nobody else will remove it
                atomic.remove(Path(report.folder))
                raise LoraToolsError("the work was called off")
    except LoraToolsError as error:
        error.problems = (*error.problems, f"in {task} of the work, by {tasks.place()}")
        raise
    return replace(report, warnings=tuple(warnings))


_LAST: list[tuple[Planned, dict[Path, inputs.Stamp], Merge]] = []
"""What this process planned last, of inputs that were so: it does several parts of a merge."""


def _again(planned: Planned) -> Merge:
    """Return the merge of a plan, made anew unless it is the last one, and its inputs are what they were."""
    for known, stamps, prepared in _LAST:
        if known == planned and all(inputs.is_still(path, was) for path, was in stamps.items()):
            for path in stamps:
                inputs.see(path)
            return prepared
    prepared = planned.again()
    # Where a reference lies here is another place in each task.
    fetched = "://" in json.dumps(planned.call.to_json())
    _LAST[:] = [] if fetched else [(planned, inputs.seen(), prepared)]
    return prepared


def _mark(output: Path, key: str) -> Path:
    """Return the folder, that of a part 0, which is there as long as the caller of workers wants their work.

    The files lie in it.
    """
    return output.with_name(f".{output.name}.part-{key[:4]}0000")


def _while_wanted(mark: Path) -> Progress:
    """Return a progress that ends a worker's task when the caller has ended; it looks once a second."""
    looked = [time.monotonic()]

    def progress(count: int) -> None:
        if (now := time.monotonic()) - looked[0] > 1:
            looked[0] = now
            if not mark.exists():
                raise LoraToolsError("the work was called off")

    return progress


@contextmanager
def _taken(output: Path, only: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the folders of parts as `part_folders` does, once nobody works in them any more.

    Dask does a part again whose result has come already, where its worker is lost just then. It finds all written, and
    ends.
    """
    end = time.monotonic() + tasks.PATIENCE
    with ExitStack() as held:
        while True:
            try:
                folders = held.enter_context(atomic.part_folders(output, only))
                break
            except OutputRefused:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield folders


def _remove(output: Path, key: str) -> None:
    """Remove the folders of parts that workers made, once those are out of them that were called off.

    One that works on has lost its connection, or its machine stands still; it removes its own when it ends.
    """
    mine = f".{output.name}.part-{key[:4]}"
    end = time.monotonic() + tasks.PATIENCE
    while held := [each for each in leftovers.parts_of(output.absolute()) if each.name.startswith(mine)]:
        for folder in held:
            with suppress(OutputRefused), atomic.part_folders(output, [folder]):
                atomic.remove(folder)
        if time.monotonic() > end:
            return
        time.sleep(0.05 if any(folder.exists() for folder in held) else 0)
