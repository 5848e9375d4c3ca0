"""Read a changed tensor of both models and the base beside it, tile by tile, into the sums that judge it.

Where one site is the whole tensor C reads both files itself, a few rows at a time, so that a tile costs Python nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.adapter.site import Site
from loratools.parallel import Progress
from loratools.parallel.memory import lent
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec
from loratools.storage.resolvers import is_far
from loratools.surgery.verify.probes import Probe, Tally, compare

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

TILE = 1 << 20
_AT_ONCE = 16  # tiles of one call of C, between two words of progress


@dataclass(slots=True)
class Sums:
    """What was met: ‖W'‖², elements outside of all sites that differ, the elements compared.

    Of codes, ‖W' − W‖² and ‖W‖² of what lies outside: these may be others where they share a scale with changed ones.
    """

    squares: float = 0.0
    strays: int = 0
    strays2: float = 0.0
    beside2: float = 0.0
    tally: Tally = field(default_factory=Tally)


def survey(source: TensorSpec, merged: TensorSpec, probes: Sequence[Probe], exact: bool, progress: Progress) -> Sums:
    """Read a tensor of the base and of the model; feed the probes, and compare the elements that these know."""
    apart = _apart([probe.site for probe in probes])
    everywhere = apart and sum(prod(probe.site.shape) for probe in probes) == source.parameters
    if everywhere and len(probes) == 1 and not exact and _passes(source, merged, probes[0]):
        return _in_c(source, merged, probes[0], progress)
    return _in_tiles(source, merged, probes, exact, progress, apart, everywhere)


def _passes(source: TensorSpec, merged: TensorSpec, probe: Probe) -> bool:
    from loratools.linalg.native import proof

    plain = not (source.encoding or merged.encoding or probe.site.transposed)
    plain = plain and not is_far(source.file) and not is_far(merged.file)
    return plain and {source.dtype, merged.dtype} <= proof.DTYPES.keys() and proof.passes()


def _in_c(source: TensorSpec, merged: TensorSpec, probe: Probe, progress: Progress) -> Sums:
    import numpy as np

    from loratools.linalg.native import proof

    specs, sums, stored = (source, merged), Sums(), (source.dtype, merged.dtype)
    rows, columns = probe.site.matrix
    step = max(1, TILE // (columns * max(dtypes.bits(dtype) // 8 for dtype in stored)))
    room = proof.room_for(columns, stored)
    with ExitStack() as stack:
        before, after = (stack.enter_context(files.descriptor(spec.file)) for spec in specs)
        W, merged_W = (np.frombuffer(stack.enter_context(lent()).of(room, spec.start), np.uint8) for spec in specs)
        way = proof.Pass(
            (before, after), (source.start, merged.start), stored, probe.X, probe.Y, probe.known, (W, merged_W)
        )
        for first in range(0, rows, _AT_ONCE * step):
            count = min(_AT_ONCE * step, rows - first)
            try:
                squares, _, old, new = way.rows(first, count)
            except EOFError as end:
                which, byte = end.args
                raise files.shortened(specs[which].file, byte) from None
            sums.squares += squares
            for start in range(0, count, step):  # what sums may err by depends on the largest number of a tile
                some = slice(start, min(start + step, count))
                in_site = slice(first + some.start, first + some.stop)
                compare(sums.tally, probe, in_site, old[some], new[some], stored, once=False, picked=True)
            progress(count * merged.nbytes // rows)
    return sums


def _in_tiles(
    source: TensorSpec, merged: TensorSpec, probes: Sequence[Probe], exact: bool, progress: Progress, apart: bool,
    everywhere: bool,
) -> Sums:  # fmt: skip
    import numpy as np

    from loratools.storage.codecs.floats import unsigned, widen
    from loratools.surgery.verify.formulas import measure

    sums, columns, stored = Sums(), probes[0].site.matrix[1], (source.dtype, merged.dtype)
    for start, count, pieces in files.row_pieces((source, merged), columns, TILE):
        before, after = (
            np.frombuffer(piece, unsigned(dtype)).reshape(count, columns)
            for piece, dtype in zip(pieces, stored, strict=True)
        )
        places = [
            (probe, (rows[0], slice(*probe.site.columns)), rows[1])
            for probe in probes
            if (rows := probe.site.overlap(start, start + count))
        ]
        squares, differing = 0.0, 0
        for probe, in_tile, in_site in places:
            old, new = before[in_tile], after[in_tile]
            more = probe.take(old, new, stored, in_site)
            squares, differing = squares + more[0], differing + more[1]
            compare(sums.tally, probe, in_site, old, new, stored, exact)
        if not everywhere:
            squares, of_all = measure(before, after, stored)
            if apart and not merged.encoding:
                sums.strays += of_all - differing
            else:
                W, numbers = (
                    widen(bits, dtype, np.float64) for bits, dtype in zip((before, after), stored, strict=True)
                )
                for _, in_tile, _ in places:
                    W[in_tile] = numbers[in_tile] = 0
                with np.errstate(invalid="ignore", over="ignore"):
                    delta = numbers - W
                    sums.strays += int(np.count_nonzero(delta))
                    sums.strays2, sums.beside2 = (
                        total + float((part**2).sum()) for total, part in ((sums.strays2, delta), (sums.beside2, W))
                    )
        sums.squares += squares
        progress(before.size * merged.nbytes // max(1, merged.parameters))
    return sums


def _apart(sites: Sequence[Site]) -> bool:
    """Tell whether no two sites share an element."""
    open_sites: list[Site] = []
    for site in sorted(sites, key=lambda site: site.rows[0]):
        open_sites = [other for other in open_sites if other.rows[1] > site.rows[0]]
        if any(site.meets(other) for other in open_sites):
            return False
        open_sites.append(site)
    return True
