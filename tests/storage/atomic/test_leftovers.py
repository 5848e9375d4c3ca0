"""What killed runs left is removed; what a living run holds, and what is somebody else's, never."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from loratools.storage.atomic import leftovers, locks, new_folder
from loratools.storage.atomic.leftovers import GARBAGE, KEPT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_kinds_are_swept_as_asked(tmp_path: Path) -> None:
    for kind in (*GARBAGE, *KEPT):
        (tmp_path / f".out.{kind}-0123abcd" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert names(tmp_path) == [".out.part-0123abcd", ".out.pull-0123abcd", ".out.resume-0123abcd", "out"]
    leftovers.sweep(tmp_path / "out", KEPT, mine=tmp_path / ".out.pull-0123abcd")
    assert names(tmp_path) == [".out.pull-0123abcd", "out"]


def test_a_locked_folder_is_left_alone_until_its_lock_ends(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial-0123abcd"
    leftover.mkdir()
    held = locks.lock(leftover)
    with pytest.raises(BlockingIOError):
        locks.lock(leftover)
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert names(tmp_path) == [".out.partial-0123abcd"]
    held.release()
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert names(tmp_path) == []


def test_an_output_moved_aside_by_a_living_run_stays_there(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abcd").mkdir()
    held = locks.lock(tmp_path / ".out.partial-0123abcd")
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert names(tmp_path) == [".out.partial-0123abcd", ".out.replaced-0123abcd"]
    held.release()
    leftovers.sweep(tmp_path / "out", GARBAGE)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [".out.partial-0123abcd", ".out.replaced-0123abcd"])
def test_links_and_files_of_such_names_are_somebody_elses(name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / name).symlink_to("precious")
    (tmp_path / ".out.partial-00000000").write_text("a file")
    leftovers.sweep(tmp_path / "out", ("partial",))
    assert names(tmp_path) == sorted([".out.partial-00000000", name, "precious"])


def test_a_lock_on_a_folder_that_was_swept_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the making of a folder and its lock another run may take it for a leftover."""
    folder = tmp_path / "folder"
    folder.mkdir()
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        folder.rmdir()
        folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileNotFoundError):
        locks.lock(folder)


def test_without_locks_nothing_is_swept_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on some network file systems; `key`, which used to be taken for another process's, works there too."""

    def none(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".out.partial-0123abcd").mkdir()
    monkeypatch.setattr(fcntl, "flock", none)
    with new_folder(tmp_path / "out", key="0123456789"):
        pass
    assert names(tmp_path) == [".out.partial-0123abcd", "out"]
    assert "perhaps left over from a run that was killed: no locks available" in caplog.text
