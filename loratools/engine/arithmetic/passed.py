"""Products on rows that are numbers in a file, passed to the output's file in C: neither torch nor NumPy is imported.

It writes what `native.py` does. A tile costs Python one call, and importing NumPy takes a tenth of such a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loratools.adapter.site import Site
from loratools.engine.plan import Change
from loratools.engine.task import Changed, TensorTask, Tile, near_zero, not_finite
from loratools.linalg.native import factors, tiles
from loratools.linalg.native.factors import Memory, Sum
from loratools.storage import dtypes, files
from loratools.storage.resolvers import is_far


def passes(change: Change) -> bool:
    """Tell whether a tensor that `native.serves` is changed here: its numbers are in a file that C reads."""
    here = change.source.encoding is None and not is_far(change.source.file)
    return here and bool(change.placements) and factors.available() and tiles.available()


class PassedRows:
    """The tiles of one tensor, from file to file in C. Its sites do not meet: `native.serves` says so."""

    together = 1

    def __init__(self, task: TensorTask, sums: Sequence[tuple[Site, Sum]], memory: Memory) -> None:
        self._task, self._sums, self._memory = task, sums, memory

    @contextmanager
    def tiles(self, step: int, take: Callable[[memoryview], None], stopped: Callable[[], bool]) -> Iterator[Tile]:
        """Give what passes a tile; it raises what `native.NativeRows.change` does, and `BadFile` for a short file."""
        task, (rows, columns), spec = self._task, self._task.matrix, self._task.source
        share = near_zero(task.dtype) or 0.0
        places = [tiles.Rectangle(site.rows, site.columns, each, each.bound() * share) for site, each in self._sums]
        everywhere = sum(site.shape[0] * site.shape[1] for site, _ in self._sums) == rows * columns
        way = tiles.Passage(places, columns, spec.dtype, self._memory, everywhere=everywhere)
        infinity = dtypes.INFINITY[task.dtype]

        def tile(start: int, measured: int) -> Changed:
            if stopped():
                raise InterruptedError
            count = min(step, rows - start)
            try:
                passed = way.rows(start, count, measured)
            except EOFError as end:
                raise files.shortened(spec.file, end.args[0]) from None
            if passed.zero_row is not None:
                place, row = passed.zero_row
                from loratools.adapter.kinds.dora import no_direction

                raise no_direction(self._sums[place][0], row)
            if passed.largest >= infinity:
                raise not_finite(task.name, task.dtype)
            take(way.stored)
            if task.watch:
                task.watch(way.stored, way.made, start)
            return Changed(way.stored, passed.retained, passed.total, passed.changed)

        with files.descriptor(spec.file) as source:
            way.between(source, spec.start, task.target, task.offset)
            yield tile
