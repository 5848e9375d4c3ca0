"""Run a merge plan: copies inside the kernel, arithmetic in row tiles, several tensors at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, local
from typing import Any

from loratools.engine import products, stochastic
from loratools.engine.arithmetic.torch import Workspace
from loratools.engine.device import TILES, exact_products, own_stream
from loratools.engine.load import check_effect, is_wide, load_terms
from loratools.engine.plan import Change, MergePlan
from loratools.engine.tensor import TensorResult, TensorTask, run
from loratools.engine.turns import Queue, Turns
from loratools.errors import WrongBase
from loratools.parallel import Progress, workers
from loratools.storage import digest, files
from loratools.storage.codecs import floats
from loratools.storage.layout import FilePlan, Slot

_COPY = 64 << 20  # bytes of one copy task: large enough to be cheap, small enough to share out and to stop

_MergeTensor = Callable[[Slot, int], TensorResult]
_Range = tuple[Path, int, int, int]  # of a file, from, to; and where it goes


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run: nothing here changes a byte of the output, but for `device` (`device.py` has the policy), and
    `rounding`, `nearest` or `stochastic`, which draws by `seed`.

    `digests` are those of the adapters, by which their products are ordered. `before` has functions for tensors that
    are changed where they will lie in the output: each puts the base's bytes there, given the file's descriptor.
    """

    digests: Sequence[str]
    threads: int
    device: str = "cpu"
    retention: str = "sample"
    seed: int = 0
    rounding: str = "nearest"
    tile_bytes: int | None = None
    before: Mapping[str, Callable[[int], None]] = field(default_factory=dict)

    @property
    def tile(self) -> int:
        """Bytes of one tile: `tile_bytes`, or what suits the device."""
        return self.tile_bytes or TILES[self.device]


def write_weights(
    plan: MergePlan,
    folder: Path,
    settings: Settings,
    progress: Progress,
    finished: Callable[[Path, list[TensorResult]], None] | None = None,
) -> list[TensorResult]:
    """Write every file of tensors of a plan into `folder`, and return what was measured of each rewritten tensor.

    Plain LoRA on the CPU is merged without torch; for anything else torch is imported, while copies run beside it. With
    `finished` the files are written one after another, and it is called with each that is complete, and what was
    measured in it; without, all at once, which keeps the threads busier. Raises `IncompatibleAdapter` for an adapter
    that would change nothing, `WrongBase` when a tensor is not the recorded one, and whatever reading, arithmetic and
    writing raise; then the files are not complete.
    """
    groups = [[file] for file in plan.files] if finished else [list(plan.files)]
    stop = Event()
    with ExitStack() as stack:
        job, turns = _Job(plan, settings, progress, stop, local()), Turns()
        pool = stack.enter_context(workers(settings.threads))
        results: list[TensorResult] = []
        merge_tensor: _MergeTensor | None = None
        for group in groups:
            with ExitStack() as opened:
                try:
                    work, ranges = [], []
                    for file in group:
                        more, parts = _open(plan, file, folder, settings.before.keys(), opened)
                        work += more
                        ranges += parts
                    copies = Queue(turns, ranges, alone=True).start(pool, settings.threads, job.copy)
                    if work and merge_tensor is None:
                        plain = settings.device == "cpu" and settings.rounding == "nearest" and products.serves(plan)
                        merge_tensor = _with_numpy(job, stack) if plain else _with_torch(job, stack)
                    tasks = Queue(turns, work).start(pool, settings.threads, partial(job.prepared, merge_tensor))
                    _finish(copies, len(ranges))
                    results += (measured := _finish(tasks, len(work)))
                except BaseException:  # no thread may write any more when the files are closed
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            if finished:
                finished(folder / group[0].name, measured)
        return sorted(results, key=lambda result: result.name)


def _open(
    plan: MergePlan, file: FilePlan, folder: Path, before: Set[str], opened: ExitStack
) -> tuple[list[tuple[int, Slot]], list[tuple[int, _Range]]]:
    """Make an output file with its header; return its tensors that are to be changed, and its ranges to be copied.

    Both come with its descriptor. The largest tensors are first, so that threads end together.
    """
    rewritten = plan.rewritten().keys() | before
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = opened.enter_context(files.descriptor(target, os.O_RDWR | os.O_CREAT | os.O_EXCL))
    os.truncate(descriptor, file.size)
    files.write_from(descriptor, memoryview(file.header), 0)
    work = sorted((slot for slot in file.slots if slot.name in rewritten), key=lambda slot: -slot.nbytes)
    ranges = _copy_ranges(plan, [slot for slot in file.slots if slot.name not in rewritten])
    return [(descriptor, slot) for slot in work], [(descriptor, part) for part in ranges]


def _with_numpy(job: _Job, stack: ExitStack) -> _MergeTensor:
    """Import NumPy; its BLAS has one thread until the stack is closed, for the workers share the cores already."""
    import numpy  # noqa: F401  (the limit below holds for libraries that are loaded)
    from threadpoolctl import threadpool_limits

    stack.enter_context(threadpool_limits(1, user_api="blas"))
    check_effect(job.plan, partial(products.acts, job.plan))
    return job.add_products


def _with_torch(job: _Job, stack: ExitStack) -> _MergeTensor:
    """Import torch, while copies run; its settings are as they were found when the stack is closed."""
    stack.enter_context(exact_products(job.settings.device))
    check_effect(job.plan)
    return job.run_terms


def _finish(futures: Sequence[Future[list[Any]]], count: int) -> list[Any]:
    """Wait for all results; whatever was not done would be zeros in the output."""
    results = [result for future in futures for result in future.result()]
    if len(results) != count:
        raise RuntimeError(f"{count - len(results)} of {count} pieces of the output were not written")
    return results


def _copy_ranges(plan: MergePlan, slots: Sequence[Slot]) -> list[_Range]:
    """Join untouched tensors that follow each other in source and output into (file, start, stop, offset) pieces."""
    runs: list[_Range] = []
    for slot in slots:
        source = plan.changes[slot.name].source
        if runs and runs[-1][0] == source.file and runs[-1][2] == source.start:
            file, start, stop, offset = runs[-1]
            if slot.offset - offset == stop - start:
                runs[-1] = (file, start, source.stop, offset)
                continue
        runs.append((source.file, source.start, source.stop, slot.offset))
    return [
        (file, at, min(at + _COPY, stop), offset + at - start)
        for file, start, stop, offset in runs
        for at in range(start, stop, _COPY)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What all tasks of one run share; `mine` holds the memory of each thread."""

    plan: MergePlan
    settings: Settings
    progress: Progress
    stop: Event
    mine: local

    def copy(self, target: int, piece: _Range) -> None:
        """Copy bytes of the base as they are."""
        path, start, stop, offset = piece
        if not self.stop.is_set():
            with files.descriptor(path) as source:
                files.copy_range(source, start, stop, target, offset, path)
            self.progress(stop - start)

    def prepared(self, merge_tensor: _MergeTensor | None, target: int, slot: Slot) -> TensorResult:
        """Put the base's bytes in place where the settings say how; then change them, if anything does."""
        assert merge_tensor
        if before := self.settings.before.get(slot.name):
            before(target)
            change = self.plan.changes[slot.name]
            if not change.placements and change.source.dtype == slot.dtype:
                return TensorResult(slot.name)
        return merge_tensor(slot, target)

    def add_products(self, slot: Slot, target: int) -> TensorResult:
        """Add plain products to one tensor, without torch, and check that its bytes were those of the recorded base."""
        if not hasattr(self.mine, "buffers"):
            self.mine.buffers = floats.Buffers()
        change, settings = self.plan.changes[slot.name], self.settings
        task = products.ProductTask(
            slot.name, change.source, target, slot.offset,
            products.load(self.plan, change, settings.digests, slot.name), _hashes(change),
            settings.retention, settings.seed,
        )  # fmt: skip
        result = products.run(task, self.mine.buffers, self.progress, self.stop.is_set, settings.tile)
        return self._checked(slot, result)

    def run_terms(self, slot: Slot, target: int) -> TensorResult:
        """Change one tensor by terms of any kind, in torch, and check its base likewise."""
        import torch

        device = torch.device(self.settings.device)
        if not hasattr(self.mine, "workspace"):
            torch.set_num_threads(1)  # OpenMP keeps this number for each thread
            self.mine.workspace = Workspace(device)
        change, settings = self.plan.changes[slot.name], self.settings
        random = settings.rounding == "stochastic" and slot.dtype in stochastic.DTYPES
        with own_stream(device):
            terms = load_terms(self.plan, change, slot.dtype, settings.digests, slot.name, device)
            task = TensorTask(
                slot.name, change.source, slot.dtype, target, slot.offset, terms, _hashes(change),
                settings.retention, settings.seed, is_wide(change, slot.dtype),
                stochastic.Stochastic(settings.seed, slot.name, slot.dtype) if random else None,
            )  # fmt: skip
            result = run(task, self.mine.workspace, self.progress, self.stop.is_set, settings.tile)
        return self._checked(slot, result)

    def _checked(self, slot: Slot, result: TensorResult) -> TensorResult:
        change = self.plan.changes[slot.name]
        for i, value in change.expected:
            found = result.digests[digest.algorithm_of(value)]
            if found == value:
                continue
            said = f"tensor {slot.name} is not that of the base which adapter {i + 1} was sealed with"
            if self.plan.strict:
                raise WrongBase(
                    f"{change.source.file}: {said}: its digest is {found}, recorded is {value}",
                    hint="Use the right base, or --check-base warn to merge all the same.",
                )
            result.warnings.append(said)
        return result


def _hashes(change: Change) -> list[str]:
    """Return the algorithms to hash a base tensor with: those that adapters recorded, and the default one."""
    if not change.placements or change.replaced:
        return []
    return sorted({digest.algorithm_of(value) for _, value in change.expected} | {digest.DEFAULT})
