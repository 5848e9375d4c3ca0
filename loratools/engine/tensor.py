"""The primitive under every merge: a tensor changed row tile by row tile, at the speed of the disk, in constant memory.

A tile of about a megabyte is read into a reused buffer, changed and rounded by an arithmetic, and written. It stays in
the core's cache from the read to the write; digests and retention are fed from the same tile. Tiles depend on the
tensor's shape alone, so the bytes do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loratools.engine.task import (
    TILE,
    Arithmetic,
    Changed,
    TensorResult,
    TensorTask,
    Tile,
    Tiling,
    sampled_rows,
    sampled_tiles,
    tile_reader,
)
from loratools.parallel import Progress
from loratools.storage import digest, dtypes, files
from loratools.storage.checkpoint import values


def run(
    task: TensorTask, tiling: Tiling, progress: Progress, stopped: Callable[[], bool], tile_bytes: int = TILE
) -> TensorResult:
    """Write one output tensor and return what was measured.

    `progress` is called with the number of bytes of each tile that is written. Once `stopped` says True,
    `InterruptedError` is raised before the next tile. `tile_bytes` is the size of a tile, about, as read or as written,
    whichever is larger. Raises `IncompatibleAdapter` when the result is not finite in the output's dtype.
    """
    spec, (rows, columns) = task.source, task.matrix
    width, out_width = (columns * dtypes.bits(dtype) // 8 for dtype in (spec.dtype, task.dtype))
    step = min(rows, tile_bytes // max(1, width, out_width))
    step = max(tiling.together, step - step % tiling.together)
    starts = range(0, rows, step)
    hashers = {name: values.start(spec, name) for name in task.hashes}
    sampled = sampled_tiles(task.name, task.seed, task.retention, len(starts))
    result, measured = TensorResult(task.name), 0

    def take(raw: memoryview) -> None:
        for hasher in hashers.values():
            hasher.update(values.plain(spec, raw))

    with tiling.tiles(step, take, stopped) as tile:
        for index, start in enumerate(starts):
            count = sampled_rows(task.retention, min(step, rows - start), columns) if index in sampled else 0
            changed = tile(start, count)
            progress(min(step, rows - start) * out_width)
            measured += count * columns
            result.retained += changed.retained
            result.total += changed.total
            result.changed += changed.changed
            result.overflowed += changed.overflowed
            result.flushed += changed.flushed
    share = spec.parameters / measured if measured else 0.0
    result.retained, result.total, result.changed = (x * share for x in (result.retained, result.total, result.changed))
    result.digests = {name: digest.finish(hasher, name) for name, hasher in hashers.items()}
    return result


class InMemory:
    """Tiles that are read, changed in memory by an arithmetic, and written."""

    def __init__(self, task: TensorTask, arithmetic: Arithmetic) -> None:
        self._task, self._arithmetic = task, arithmetic

    @property
    def together(self) -> int:
        """Number of rows that the arithmetic must have in one tile."""
        return self._arithmetic.together

    @contextmanager
    def tiles(self, step: int, take: Callable[[memoryview], None], stopped: Callable[[], bool]) -> Iterator[Tile]:
        """Give what writes a tile; the arithmetic sees all of them before, where it needs that."""
        task, arithmetic = self._task, self._arithmetic
        (rows, columns), spec = task.matrix, task.source
        width, out_width = (columns * dtypes.bits(dtype) // 8 for dtype in (spec.dtype, task.dtype))
        room = arithmetic.room(min(step, rows))
        with files.opened(spec) as fill:
            read = tile_reader(fill, room, step, (rows, width), stopped)
            for start in range(0, rows, step) if arithmetic.needs_pass else ():
                arithmetic.observe(read(start), start)

            def tile(start: int, measured: int) -> Changed:
                raw = read(start)
                take(raw)
                changed = arithmetic.change(raw, start, measured)
                files.write_from(task.target, changed.raw, task.offset + start * out_width)
                return changed

            yield tile
