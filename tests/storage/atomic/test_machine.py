"""On a server's file system a lock tells nothing of other machines: what may be theirs is left alone for a day."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from loratools.storage.atomic import leftovers, machine, system
from loratools.storage.atomic.leftovers import GARBAGE

DAY = 86400


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file system is among those of servers, as the table says."""
    told = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("needs stat -f, which tells the number of a file system")
    assert not system.is_served(tmp_path)
    monkeypatch.setitem(system._SERVED, int(told.stdout, 16), "a disk")
    assert system.is_served(tmp_path)
    return tmp_path


def _age(folder: Path, seconds: float) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_token_ends_in_the_mark_of_this_machine() -> None:
    assert machine.token() != machine.token()
    assert {machine.token()[8:], machine.token()[8:]} == {machine.mark()}
    assert len(machine.mark()) == 4


def test_what_another_machine_made_stays_for_a_day(served: Path) -> None:
    other = f"{int(machine.mark(), 16) ^ 1:04x}"
    names = [f".out.{kind}-01234567{other}" for kind in GARBAGE]
    for name in (*names, ".out.partial-01234567"):
        (served / name).mkdir()
        (served / name / "file").write_text("half")
    (served / "out").mkdir()
    leftovers.sweep(served / "out", GARBAGE)
    assert sorted(path.name for path in served.iterdir()) == sorted([*names, ".out.partial-01234567", "out"])
    for name in names:
        _age(served / name, DAY + 60)
    _age(served / ".out.partial-01234567", DAY + 60)
    (served / ".out.partial-01234567" / "file").write_text("more")
    leftovers.sweep(served / "out", GARBAGE)
    assert sorted(path.name for path in served.iterdir()) == [".out.partial-01234567", "out"]


def test_what_this_machine_made_goes_at_once(served: Path) -> None:
    (served / f".out.partial-{machine.token()}").mkdir()
    leftovers.sweep(served / "out", GARBAGE)
    assert list(served.iterdir()) == []


def test_on_a_disk_of_its_own_locks_tell(tmp_path: Path) -> None:
    other = f"{int(machine.mark(), 16) ^ 1:04x}"
    (tmp_path / f".out.partial-01234567{other}").mkdir()
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert list(tmp_path.iterdir()) == []
