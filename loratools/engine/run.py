"""Run a merge plan: copies inside the kernel, arithmetic in row tiles, several tensors at a time.

The arithmetic is chosen for each tensor by what becomes of it alone, so its bytes do not depend on any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, local
from typing import TYPE_CHECKING, Any

from loratools.decisions import decided, detailed
from loratools.engine.arithmetic import native, passed
from loratools.engine.copies import Range, copy_ranges
from loratools.engine.device import LANES, TILES, exact_products, kind_of
from loratools.engine.load import check_effect, is_wide, load_products, load_sums, load_terms
from loratools.engine.plan import Change, MergePlan, Recoded
from loratools.engine.sealed import algorithms, compare
from loratools.engine.task import Arithmetic, Restore, TensorResult, TensorTask, Tiling, Watch
from loratools.engine.tensor import InMemory, run
from loratools.engine.turns import Queue, Turns
from loratools.linalg.native import available, why_not
from loratools.linalg.native.factors import Memory
from loratools.parallel import Progress, workers
from loratools.storage import files
from loratools.storage.atomic import system
from loratools.storage.layout import FilePlan, Slot

if TYPE_CHECKING:
    from concurrent.futures import Future


@dataclass(slots=True, eq=False)
class Work:
    """A tensor to be changed, and where it goes in one file: one slot, or those of its parts where it becomes codes."""

    name: str
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(slot.nbytes for slot in self.slots)


Run = Callable[[TensorTask, Arithmetic], TensorResult]


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How to run: nothing here changes a byte of the output, but for `device` (`device.py` has the policy), and
    `rounding`, `nearest` or `stochastic`, which draws by `seed`. `before` has functions for tensors that are
    changed where they will lie in the output: each puts the base's bytes there, unless an adapter replaces them.
    `watch` may return what sees a tensor's tiles, by its name.
    """

    threads: int
    device: str = "cpu"
    retention: str = "sample"
    seed: int = 0
    rounding: str = "nearest"
    tile_bytes: int | None = None
    before: Mapping[str, Restore] = field(default_factory=dict)
    watch: Callable[[str], Watch | None] | None = None

    @property
    def tile(self) -> int:
        """Bytes of one tile: `tile_bytes`, or what suits the device."""
        return self.tile_bytes or TILES[kind_of(self.device)]

    @property
    def workers(self) -> int:
        """Threads that work: `threads`, but no more than a device has lanes."""
        return self.threads if self.device == "cpu" else min(self.threads, LANES)

    def random(self, dtype: str) -> bool:
        """Tell whether a tensor of this dtype is rounded at random."""
        if self.rounding != "stochastic":
            return False
        from loratools.engine.stochastic import DTYPES  # most merges round to nearest

        return dtype in DTYPES


def in_torch(plan: MergePlan, settings: Settings | None = None) -> Set[str]:
    """Return the names of the tensors that torch has to change; where there is none, torch is not imported.

    Without `settings` those are meant that change no byte: on the processor, rounded to nearest.
    """
    settings = settings or Settings(1)
    slots = {slot.name: slot.dtype for file in plan.files for slot in file.slots}
    late = set()
    for name, change in plan.rewritten().items():
        tensor = change.part_of or name
        change = plan.changes[tensor]
        dtype = "F32" if change.recoded else slots[name]
        random = settings.random(dtype)
        if settings.device != "cpu" or random or not native.serves(change, dtype):
            late.add(tensor)
    return late


def write_weights(
    plan: MergePlan, folder: Path, settings: Settings, progress: Progress,
    finished: Callable[[FilePlan, list[TensorResult]], None] | None = None,
) -> list[TensorResult]:  # fmt: skip
    """Write every file of tensors of a plan into `folder`, and return what was measured of each rewritten tensor.

    A file that is there already keeps what is not written here: others may write other tensors of it meanwhile.

    What the C code serves is merged first, without torch; where other tensors need torch it is imported beside that
    and the copies. With `finished` the files are written one after another, and it is called with each that is
    complete, and what was measured in it; without, all at once, which keeps the threads busier. Raises
    `IncompatibleAdapter` for an adapter that would change nothing, `WrongBase` when a tensor is not the recorded one,
    and whatever reading, arithmetic and writing raise; then the files are not complete.
    """
    groups = [[file] for file in plan.files] if finished else [list(plan.files)]
    late, turns = in_torch(plan, settings), Turns()
    decided(
        "arithmetic on %s: %d tensors in C, %d in torch%s",
        settings.device, len(plan.rewritten()) - len(late), len(late),
        "" if not late else f", such as {min(late)}" if available() else f"; {why_not()}",
    )  # fmt: skip
    for name in plan.rewritten():
        detailed("%s: rewritten in %s", name, "torch" if name in late else "C")
    restored = {name for name in settings.before if not plan.changes[name].replaced}
    job = _Job(plan, settings, progress, late, Event(), local())
    results: list[TensorResult] = []
    with workers(settings.workers) as pool:
        for group in groups:
            with ExitStack() as descriptors:
                try:
                    work, ranges = _open(plan, group, folder, restored, descriptors)
                    copies = Queue(turns, ranges, alone=True).start(pool, settings.workers, job.copy)
                    soon = [item for item in work if item[1].name not in late]
                    tasks = [*Queue(turns, soon).start(pool, settings.workers, job.merge)]
                    if group is groups[0]:
                        check_effect(plan)
                    if len(soon) < len(work):
                        descriptors.enter_context(exact_products(settings.device))
                        later = [item for item in work if item[1].name in late]
                        tasks += Queue(turns, later).start(pool, settings.workers, job.merge)
                    _finish(copies, len(ranges))
                    results += (measured := _finish(tasks, len(work)))
                except BaseException:  # no thread may write any more when the files are closed
                    job.stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            if finished:
                finished(group[0], measured)
    return sorted(results, key=lambda result: result.name)


def _open(
    plan: MergePlan, group: Sequence[FilePlan], folder: Path, before: Set[str], descriptors: ExitStack
) -> tuple[list[tuple[int, Work]], list[tuple[int, Range]]]:
    """Make output files with their headers; return their tensors that are to be changed, and the ranges to be copied.

    Both come with their file's descriptor. The largest tensors are first, so that threads end together.
    """
    rewritten = plan.rewritten().keys() | before
    work: list[tuple[int, Work]] = []
    ranges: list[tuple[int, Range]] = []
    for file in group:
        target = folder / file.name
        for parent in reversed(Path(file.name).parents[:-1]):  # not the folder itself: who made it may have removed it
            (folder / parent).mkdir(exist_ok=True)
        descriptor = descriptors.enter_context(files.descriptor(target, os.O_RDWR | os.O_CREAT))
        system.make_room(descriptor, file.size)
        files.write_from(descriptor, memoryview(file.header), 0)
        changed: dict[str, list[Slot]] = {}
        for slot in file.slots:
            if slot.name in rewritten:
                changed.setdefault(plan.changes[slot.name].part_of or slot.name, []).append(slot)
        items = [Work(name, tuple(slots)) for name, slots in changed.items()]
        work += [(descriptor, item) for item in sorted(items, key=lambda item: -item.nbytes)]
        kept = [slot for slot in file.slots if slot.name not in rewritten]
        ranges += [(descriptor, part) for part in copy_ranges(plan, kept)]
    return work, ranges


def _finish(futures: Sequence[Future[list[Any]]], count: int) -> list[Any]:
    """Wait for all results; whatever was not done would be zeros in the output."""
    results = [result for future in futures for result in future.result()]
    if len(results) != count:
        raise RuntimeError(f"{count - len(results)} of {count} pieces of the output were not written")
    return results


@dataclass(slots=True, eq=False)
class _Job:
    """What all tasks of one run share. `late` are the tensors for torch; `mine` holds the memory of each thread."""

    plan: MergePlan
    settings: Settings
    progress: Progress
    late: Set[str]
    stop: Event
    mine: local

    def copy(self, target: int, piece: Range) -> None:
        """Copy bytes of the base as they are."""
        path, start, stop, offset = piece
        if not self.stop.is_set():
            with files.descriptor(path) as source:
                files.copy_range(source, start, stop, target, offset, path)
            self.progress(stop - start)

    def merge(self, target: int, work: Work) -> TensorResult:
        """Put the base's bytes in place where the settings say how; then change them, if anything does."""
        change, settings = self.plan.changes[work.name], self.settings
        if change.recoded:
            return self._recode(target, work, change, change.recoded)
        slot = work.slots[0]
        if (before := settings.before.get(slot.name)) and not change.replaced:
            before(target, slot.offset)
            if not change.placements and change.source.dtype == slot.dtype:
                return TensorResult(slot.name)
        watch = settings.watch(slot.name) if settings.watch and slot.name not in self.late else None
        task = TensorTask(
            slot.name, change.source, change.matrix, slot.dtype, target, slot.offset, algorithms(change),
            settings.retention if change.placements else "off", settings.seed, watch,
        )  # fmt: skip
        result = (self._in_torch if slot.name in self.late else self._in_c)(task, change)
        compare(self.plan, change, result)
        return result

    def _recode(self, target: int, work: Work, change: Change, recoded: Recoded) -> TensorResult:
        """Make codes of the changed weight again, and write those parts that lie in this file."""
        from loratools.engine import coded

        hashes, seed = algorithms(change), self.settings.seed
        task = TensorTask(work.name, change.source, change.matrix, "F32", target, 0, hashes, seed=seed)
        random = self.settings.rounding == "stochastic"

        def encode(task: TensorTask, arithmetic: Arithmetic) -> TensorResult:
            return coded.run(
                task, recoded, arithmetic, work.slots, self.progress, self.stop.is_set, random=random,
                tile_bytes=self.settings.tile,
            )  # fmt: skip

        result = (self._in_torch if work.name in self.late else self._in_c)(task, change, encode)
        compare(self.plan, change, result)
        return result

    def _in_c(self, task: TensorTask, change: Change, run_with: Run | None = None) -> TensorResult:
        if run_with is None and passed.passes(change):
            if not hasattr(self.mine, "memory"):
                self.mine.memory = Memory()
            sums = load_sums(self.plan, change, task.name, self.mine.memory)
            return self._tiled(task, passed.PassedRows(task, sums, self.mine.memory))
        if not hasattr(self.mine, "buffers"):
            from loratools.storage.codecs.floats import Buffers

            self.mine.buffers = Buffers()
        products = load_products(self.plan, change, task.name)
        return (run_with or self._run)(task, native.NativeRows(task, products, self.mine.buffers))

    def _in_torch(self, task: TensorTask, change: Change, run_with: Run | None = None) -> TensorResult:
        import torch

        from loratools.engine.arithmetic.torch import TorchRows, Workspace
        from loratools.engine.stochastic import Stochastic

        device, settings = torch.device(self.settings.device), self.settings
        if device.type == "mps" and self._needs_float64(task, change):
            device = torch.device("cpu")
        if not hasattr(self.mine, "workspaces"):
            torch.set_num_threads(1)  # OpenMP keeps this number for each thread
            self.mine.workspaces = {}
        if (workspace := self.mine.workspaces.get(device)) is None:
            self.mine.workspaces[device] = workspace = Workspace(device)
        with workspace.lane():
            terms = load_terms(self.plan, change, task.dtype, task.name, device)
            random = settings.random(task.dtype)
            drawn = Stochastic(settings.seed, task.name, task.dtype) if random else None
            wide = is_wide(change, task.dtype)
            rows = TorchRows(task, terms, workspace, wide=wide, stochastic=drawn)
            return (run_with or self._run)(task, rows)

    def _needs_float64(self, task: TensorTask, change: Change) -> bool:
        """Tell whether a tensor is computed in float64, or has a term that may take norms of what is under it."""
        import torch

        terms = load_terms(self.plan, change, task.dtype, task.name, torch.device("cpu"))
        return is_wide(change, task.dtype) or any(term.needs_pass or term.needs_base for _, term in terms)

    def _run(self, task: TensorTask, arithmetic: Arithmetic) -> TensorResult:
        return self._tiled(task, InMemory(task, arithmetic))

    def _tiled(self, task: TensorTask, tiling: Tiling) -> TensorResult:
        return run(task, tiling, self.progress, self.stop.is_set, self.settings.tile)
