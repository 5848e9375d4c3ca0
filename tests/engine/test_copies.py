"""Which bytes of files are copied: what follows each other in one piece, and large pieces cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.engine import copies
from loratools.engine.copies import copy_ranges
from loratools.engine.plan import Change, MergePlan
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.layout import Slot
from tests.engine.models import numbers
from tests.surgery.models import save_base


def test_neighbours_are_one_piece_and_long_pieces_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_COPY", 100)
    one, other = tmp_path / "one", tmp_path / "other"
    where = {"a": (one, 8, 0), "b": (one, 58, 50), "c": (one, 108, 110), "d": (other, 158, 160), "e": (other, 208, 210)}
    specs = {name: TensorSpec("U8", (50,), file, start, start + 50) for name, (file, start, _) in where.items()}
    slots = [Slot(name, "U8", (50,), offset, 50) for name, (_, _, offset) in where.items()]
    base = Checkpoint.open(save_base(tmp_path / "base", {"w": numbers(2, 2, seed=1)}))
    plan = MergePlan(base, (), (), {name: Change(spec) for name, spec in specs.items()})
    assert copy_ranges(plan, slots) == [(one, 8, 108, 0), (one, 108, 158, 110), (other, 158, 258, 160)]
    assert copy_ranges(plan, slots[:1]) == [(one, 8, 58, 0)]
    monkeypatch.setattr(copies, "_COPY", 70)
    assert copy_ranges(plan, slots[:2]) == [(one, 8, 78, 0), (one, 78, 108, 70)]
    assert copy_ranges(plan, []) == []
