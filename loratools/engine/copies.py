"""What of a base comes to the output as it is: bytes of files, in pieces that threads share out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratools.engine.plan import MergePlan
from loratools.storage.layout import Slot

Range = tuple[Path, int, int, int]
"""Bytes of a file, from and to, and where they go in another."""

_COPY = 64 << 20  # bytes of one copy task: large enough to be cheap, small enough to share out and to stop


def copy_ranges(plan: MergePlan, slots: Sequence[Slot]) -> list[Range]:
    """Join untouched tensors that follow each other in source and output into (file, start, stop, offset) pieces."""
    runs: list[Range] = []
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
