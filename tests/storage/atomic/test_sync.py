"""Everything is on the disk before it has its name: in which order fsync is called, and what its refusal means."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from loratools.errors import NoSpace
from loratools.storage import atomic
from loratools.storage.atomic.sync import sync

Calls = list[tuple[Path, bool]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Each call of fsync: the path of what is synced, and whether the output was there by then."""
    made: Calls = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        made.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "out").exists()))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only /proc tells what is synced")
    monkeypatch.setattr(os, "fsync", noted)
    return made


def write(scratch: Path) -> None:
    (scratch / "inner").mkdir()
    (scratch / "inner" / "b").write_text("b")
    (scratch / "a").write_text("a")
    (scratch / "link").symlink_to("/dev/null")


def test_files_then_folders_then_the_name(tmp_path: Path, calls: Calls) -> None:
    with atomic.new_folder(tmp_path / "out") as scratch:
        write(scratch)
        assert calls == []
    before = [path.relative_to(scratch).as_posix() for path, there in calls if not there]
    assert before == ["a", "inner/b", "inner", "."]
    assert [path for path, there in calls if there] == [tmp_path]


def test_a_file_and_its_folder(tmp_path: Path, calls: Calls) -> None:
    with atomic.new_file(tmp_path / "out") as path:
        path.write_text("1")
    assert calls == [(path, False), (tmp_path, True)]


def test_what_need_not_last_is_not_waited_for(tmp_path: Path, calls: Calls) -> None:
    with atomic.new_folder(tmp_path / "out", durable=False) as scratch:
        write(scratch)
    assert calls == []


def test_the_old_one_goes_when_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    names: list[list[str]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        names.append(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic.new_folder(tmp_path / "out", force=True) as scratch:
        (scratch / "new").write_text("new")
    assert all(any(name.endswith("/old") for name in each) for each in names)  # also when the new names were synced
    assert names[-1][-1] == "out/new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "raised"), [(errno.ENOSPC, NoSpace), (errno.EIO, OSError)])
@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_refuses_leaves_the_old(
    number: int, raised: type[Exception], force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(raised) as caught, atomic.new_folder(tmp_path / "out", force=force) as scratch:
        (scratch / "new").write_text("new")
    assert "new" in str(getattr(caught.value, "filename", "new"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/old"] * force


def test_folders_that_cannot_be_synced_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""
    (tmp_path / "a").write_text("a")
    synced = []

    def files_only(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    sync(tmp_path)
    assert len(synced) == 1
