"""Folders for temporary files: they go away, those of killed runs too, and nobody else's."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loratools.storage.atomic import locks, temporary
from tests.conftest import clean_env


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_it_goes_away(error: BaseException | None, place: Path) -> None:
    def work() -> None:
        with temporary("merge") as folder:
            (folder / "deep").mkdir()
            assert folder.parent == place
            assert folder.name.startswith("loratools-merge-")
            assert folder.stat().st_mode & 0o77 == 0
            if error:
                raise error

    if error:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert names(place) == []


def test_what_killed_runs_left_goes_too(place: Path) -> None:
    program = (
        "import os, signal; from loratools.storage.atomic import temporary\n"
        "with temporary('demo') as folder:\n    (folder / 'big').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = clean_env() | {"TMPDIR": str(place)}
    assert subprocess.run([sys.executable, "-c", program], env=env, check=False).returncode == -signal.SIGKILL
    (left,) = place.iterdir()
    kept = ["loratools-demo-notes", "loratools-demo-0123456789", "loratools-tests-01234567", "other-demo-01234567"]
    for name in kept:
        (place / name).mkdir()
    (place / "loratools-demo-abcdefgh").write_text("a file")
    held = place / "loratools-demo-00000000"
    held.mkdir()
    lock = locks.lock(held)
    with temporary("merge"):
        assert not left.exists()
    assert names(place) == sorted([*kept, "loratools-demo-00000000", "loratools-demo-abcdefgh"])
    lock.release()
    with temporary("headers"):
        assert not held.exists()
