"""A file and those beside it: all of the new or all of the old, wherever a run is killed between two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loratools.errors import OutputRefused
from loratools.storage import atomic

_RUN = """
import os, signal, sys
from pathlib import Path
from loratools.storage import atomic

target, moment, steps = Path(sys.argv[1]), int(sys.argv[2]), 0

def stop(event, arguments):
    global steps
    if event in ("os.rename", "os.mkdir", "open") and str(arguments[0]).startswith(str(target.parent)):
        steps += 1
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)

with atomic.new_files(target, ["out.rest", "out.more"], force=True, durable=False) as scratch:
    (scratch / "out.file").write_text("new")
    (scratch / "out.rest").write_text("new")
    sys.addaudithook(stop)
"""
OLD, NEW = {"out.file": "old", "out.more": "old"}, {"out.file": "new", "out.rest": "new"}


def state(folder: Path) -> dict[str, str]:
    """Return what a reader sees."""
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_kill_between_any_two_steps(tmp_path: Path) -> None:
    seen = set()
    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for name, text in OLD.items():
            (folder / name).write_text(text)
        done = subprocess.run([sys.executable, "-c", _RUN, str(folder / "out.file"), str(moment)], check=False)
        killed_as = state(folder).get("out.file")
        atomic.sweep(folder / "out.file")
        assert state(folder) == (NEW if killed_as == "new" else OLD), moment
        assert {path.name for path in folder.iterdir()} == state(folder).keys()
        seen.add((done.returncode, killed_as))
        if not done.returncode:
            break
    assert seen >= {(-9, "old"), (0, "new")}
    assert moment > 4


def test_what_is_there_is_refused_or_goes(tmp_path: Path) -> None:
    (tmp_path / "out.more").write_text("old")
    with pytest.raises(OutputRefused, match="exists already"), atomic.new_files(tmp_path / "out.file", ["out.more"]):
        pass
    with atomic.new_files(tmp_path / "out.file", ["out.more"], force=True) as scratch:
        (scratch / "out.file").write_text("new")
    assert state(tmp_path) == {"out.file": "new"}
    with pytest.raises(ZeroDivisionError), atomic.new_files(tmp_path / "out.file", ["out.more"], force=True) as scratch:
        (scratch / "out.more").write_text(str(1 // 0))
    assert state(tmp_path) == {"out.file": "new"}
    assert [*tmp_path.iterdir()] == [tmp_path / "out.file"]


def test_somebody_was_faster(tmp_path: Path) -> None:
    target = tmp_path / "out.file"

    def race() -> None:
        with atomic.new_files(target, ["out.more"]) as scratch:
            (scratch / "out.file").write_text("new")
            (scratch / "out.more").write_text("new")
            target.write_text("of another")

    with pytest.raises(OutputRefused):
        race()
    assert state(tmp_path) == {"out.file": "of another"}
    assert [*tmp_path.iterdir()] == [target]
