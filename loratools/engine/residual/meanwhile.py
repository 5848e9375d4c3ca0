"""Code what a merge destroys while it happens: from its own tiles, which are still in the core's cache.

A tile that was just written is coded beside what it was before. What is not shown here, tensors that torch changes,
rescaled, cast or stored ones, `keep` looks at afterwards; the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from loratools.engine.residual import Array, Lost
from loratools.engine.residual import predict as undo
from loratools.engine.residual.keep import Early, lost_by, residual_name
from loratools.engine.residual.tiles import Coder
from loratools.parallel import Progress, no_progress
from loratools.storage import files
from loratools.storage.codecs.floats import unsigned

if TYPE_CHECKING:
    from loratools.engine.plan import MergePlan
    from loratools.engine.task import Watch


class Meanwhile:
    """Codes the tensors of a base while they are merged; `early` is what there is of the residual."""

    def __init__(self, lost: dict[str, Lost], spool: BinaryIO, progress: Progress) -> None:
        self.early = Early(spool)
        self._lost, self._progress, self._end, self._lock = lost, progress, 0, Lock()

    def add(self, name: str, blob: bytes) -> None:
        """Take what tells a tensor of the base from its predictions; from any thread."""
        with self._lock:
            start, self._end = self._end, self._end + len(blob)
        files.write_from(self.early.spool.fileno(), memoryview(blob), start)
        self.early.pieces[name] = start, len(blob)

    def watch(self, name: str) -> Watch | None:
        """Return what takes the tiles of a tensor, in order, each as it was and as it was written.

        None where this is not the time to code the tensor.
        """
        lost = self._lost.get(name)
        if lost is None or lost.mode != "predicted":
            return None
        steps = undo.steps(lost.placements)
        if any(step.gains is not None for step in steps):  # they are measured on all of the base first
            return None
        return _Watched(lost, Coder(lost, steps), self.add, self._progress)


class _Watched:
    """Codes one tensor from tiles of any height; what does not fill one of the residual's is kept until it does."""

    def __init__(self, lost: Lost, coder: Coder, add: Callable[[str, bytes], None], progress: Progress) -> None:
        assert lost.after is not None
        self._lost, self._after, self._coder, self._add = lost, lost.after, coder, add
        self._progress = progress
        self._tiles = lost.tiles()
        self._tile = next(self._tiles, (0, 0))
        self._rest: tuple[Array, Array] | None = None
        self._parts: list[bytes] = []

    def __call__(self, stored: memoryview, made: memoryview, first: int) -> None:
        """Take a tile as it was and as it is, whose first row is `first`."""
        columns = self._lost.matrix[1]
        W = np.frombuffer(stored, unsigned(self._lost.dtype))
        after = np.frombuffer(made, unsigned(self._after.dtype))
        if self._rest is not None:
            W, after = (np.concatenate(pair) for pair in zip(self._rest, (W, after), strict=True))
            self._rest = None
        (start, stop), at = self._tile, 0
        while stop > start and len(W) - at >= (stop - start) * columns:
            first, height, last, end = start, stop - start, stop, at  # those of one height at once
            while stop - start == height and len(W) - end >= height * columns:
                last, end = stop, end + height * columns
                start, stop = self._tile = next(self._tiles, (0, 0))
            self._parts.append(self._coder.blocks(W[at:end], after[at:end], first, last, height))
            self._progress(W[at:end].nbytes)
            at = end
        if at < len(W):
            self._rest = W[at:].copy(), after[at:].copy()
        if stop == start:
            self._add(self._lost.name, b"".join(self._parts))


@contextmanager
def meanwhile(plan: MergePlan, folder: Path, progress: Progress = no_progress) -> Iterator[Meanwhile]:
    """Give what codes the residual of a merge into `folder` while it runs; what it holds goes away with the block."""
    stored = plan.base.stored or plan.base
    path = folder / f".{residual_name(plan)}.early"
    try:
        with path.open("w+b") as spool:
            yield Meanwhile({lost.name: lost for lost in lost_by(plan, stored, folder)}, spool, progress)
    finally:
        path.unlink(missing_ok=True)  # once it is closed: Windows keeps the name of an open file
