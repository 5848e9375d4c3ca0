"""Outputs appear whole or not at all, whatever ends the run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools.errors import BadFile, NoSpace, OutputRefused
from loratools.storage import atomic
from tests.conftest import clean_env


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder(target: Path, work: Callable[[Path], object], force: bool = False) -> None:
    with atomic.new_folder(target, force=force) as scratch:
        work(scratch)


def file(target: Path, work: Callable[[Path], object], force: bool = False) -> None:
    with atomic.new_file(target, force=force) as scratch:
        work(scratch)


def never(_: Path) -> None:
    raise AssertionError("the block must not run")


def test_a_folder_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic.new_folder(target) as scratch:
        (scratch / "a").write_text("1")
        assert not target.exists()
        assert scratch.parent == tmp_path
    assert (target / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    with atomic.new_file(target) as scratch:
        scratch.write_text("1")
        assert scratch.suffix == ".safetensors"
        assert not target.exists()
    assert target.read_text() == "1"
    assert names(tmp_path) == ["out.safetensors"]


def test_outputs_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), BadFile("x"), MemoryError()])
@pytest.mark.parametrize("force", [False, True])
def test_any_exception_leaves_nothing(tmp_path: Path, error: BaseException, force: bool) -> None:
    target = tmp_path / "out"
    if force:
        target.mkdir()
        (target / "old").write_text("old")

    def fail(scratch: Path) -> None:
        if scratch.is_dir():
            (scratch / "deep").mkdir()
            scratch /= "deep/a"
        scratch.write_text("1")
        raise error

    for make, output in ((folder, target), (file, tmp_path / "file")):
        with pytest.raises(type(error)) as caught:
            make(output, fail, force)
        assert caught.value is error
        assert names(tmp_path) == (["out"] if force else [])
    assert not force or (target / "old").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence(tmp_path: Path, number: int) -> None:
    with pytest.raises(NoSpace, match=r"out: .*; nothing was written") as caught, atomic.new_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number).lower() in caught.value.message
    assert names(tmp_path) == []


def test_another_error_of_the_system_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic.new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "x")


def test_an_existing_output_is_refused_and_replaced_by_force(tmp_path: Path) -> None:
    old, single = tmp_path / "folder", tmp_path / "file"
    old.mkdir()
    (old / "old").write_text("old")
    single.write_text("old")
    for make, target in ((folder, old), (file, single)):
        with pytest.raises(OutputRefused, match="exists already"):
            make(target, never)
    with atomic.new_folder(old, force=True) as scratch:
        (scratch / "new").write_text("new")
        assert names(old) == ["old"]
    with atomic.new_file(single, force=True) as scratch:
        scratch.write_text("new")
        assert single.read_text() == "old"
    assert names(tmp_path) == ["file", "folder"]
    assert names(old) == ["new"]
    assert single.read_text() == "new"


def test_force_does_not_turn_files_into_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputRefused, match="is a file; the output would be a folder"):
        folder(tmp_path / "file", never, force=True)
    with pytest.raises(OutputRefused, match="is a folder; the output would be a file"):
        file(tmp_path / "folder", never, force=True)
    assert names(tmp_path) == ["file", "folder"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race(scratch: Path) -> None:
        if scratch.is_dir():
            target.mkdir()
            (target / "theirs").write_text("theirs")
        else:
            (tmp_path / "file").write_text("theirs")
            scratch.write_text("mine")

    with pytest.raises(OutputRefused, match="exists already"):
        folder(target, race)
    with pytest.raises(OutputRefused, match="exists already"):
        file(tmp_path / "file", race)
    assert names(target) == ["theirs"]
    assert (tmp_path / "file").read_text() == "theirs"
    assert names(tmp_path) == ["file", "out"]


def test_links_and_missing_parents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("link", "dangling"):
        with pytest.raises(OutputRefused, match="exists already"):
            atomic.check_output(tmp_path / name)
        with pytest.raises(OutputRefused, match="symbolic link"):
            atomic.check_output(tmp_path / name, force=True)
    with pytest.raises(BadFile, match="no such folder"):
        atomic.check_output(tmp_path / "missing" / "out")
    with pytest.raises(BadFile, match="no such folder"):
        atomic.check_output(tmp_path / "missing" / "out", force=True)


def test_force_never_deletes_where_you_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "sub")
    for slip in (".", "..", "../..", "/", str(tmp_path / "project")):
        with pytest.raises(OutputRefused, match="current folder"):
            folder(Path(slip), never, force=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "project" / "sub"))
    with pytest.raises(OutputRefused, match="home folder"):
        folder(tmp_path / "project", never, force=True)
    assert names(tmp_path / "project") == ["sub"]


KILLED = """
import os, signal, sys
from pathlib import Path
from loratools.storage import atomic
from loratools.storage.atomic import outputs, place
target, moment, force = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "force"
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "between":  # after the old folder was moved aside, before the new one is in its place
    place._NAME = "no_such_function"
    Path.replace = die
elif moment == "before":
    place._function = die
elif moment == "after":  # before the old folder is deleted
    outputs.remove = die
elif moment == "stop":
    die = lambda: (print("writing", flush=True), sys.stdin.read())
with atomic.new_folder(target, force=force) as scratch:
    (scratch / "new").write_text("new")
    if moment in ("inside", "stop"):
        die()
"""


def kill(target: Path, moment: str, *, force: bool = False) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), moment, "force" if force else ""], check=False, env=clean_env()
    )
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out [1]*"  # a name that would mislead a glob
    kill(target, "inside")
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out [1]*.partial-")
    (tmp_path / "out 1").mkdir()
    with atomic.new_folder(target) as scratch:
        assert not leftover.exists()
        assert names(scratch) == []
    assert names(tmp_path) == ["out 1", "out [1]*"]


def test_a_leftover_of_the_same_process_number_is_removed_too(tmp_path: Path) -> None:
    # In containers every run has the same number, so a number tells nothing.
    leftover = tmp_path / f".out.partial-{os.getpid():08x}"
    (leftover / "deep").mkdir(parents=True)
    with atomic.new_folder(tmp_path / "out"):
        assert not leftover.exists()


@pytest.mark.parametrize("moment", ["inside", "before", "between", "after"])
def test_killed_while_replacing(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    kill(target, moment, force=True)
    assert target.exists() == (moment != "between")  # which only happens where two names cannot be exchanged
    assert not target.exists() or names(target) == (["new"] if moment == "after" else ["old"])
    with pytest.raises(OutputRefused, match="exists already"):
        folder(target, never)
    # Whatever was half done is undone or finished, and nothing lies about.
    assert names(tmp_path) == ["out"]
    assert names(target) == (["new"] if moment == "after" else ["old"])


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), "stop", ""],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_env(),
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "writing\n"
        (theirs,) = tmp_path.iterdir()
        with atomic.new_folder(target) as scratch:
            assert scratch != theirs
            assert names(theirs) == ["new"]
            (scratch / "mine").write_text("mine")
        assert names(theirs) == ["new"]
        other.stdin.close()
        assert other.wait(timeout=60) == 1  # it finds that the output exists by now
    assert names(tmp_path) == ["out"]
    assert names(target) == ["mine"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".out.partial-notes", ".out.partial-1234", ".outer.partial-00000000", "out.partial-00000000"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*before, "out"])


def test_remove_takes_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "link", "file", "nothing"):
        atomic.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]


def test_the_first_step_of_every_verb_sweeps(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kill(target, "inside")
    target.mkdir()
    kill(target, "between", force=True)
    assert not target.exists()
    (tmp_path / ".out.resume-00112233").mkdir()
    (tmp_path / ".out.pull-0011223344556677").mkdir()
    atomic.sweep(target)
    # The old output is back, and what a run left on purpose stays.
    assert names(tmp_path) == [".out.pull-0011223344556677", ".out.resume-00112233", "out"]
    atomic.sweep("/")


def test_a_replaced_folder_is_never_missing(tmp_path: Path) -> None:
    """Another process looks as often as it can while an output is replaced a hundred times."""
    target = tmp_path / "out"
    target.mkdir()
    watch = """
import os, select, sys
seen = missing = 0
print("looking", flush=True)
while seen % 100 or not select.select([0], [], [], 0)[0]:
    seen += 1
    missing += not os.path.exists(sys.argv[1])
print(seen, missing)
"""
    with subprocess.Popen(
        [sys.executable, "-c", watch, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "looking\n"
        for number in range(100):
            with atomic.new_folder(target, force=True, durable=False) as scratch:
                (scratch / str(number)).touch()
        other.stdin.write("x")
        other.stdin.close()
        seen, missing = map(int, other.stdout.read().split())
    assert seen > 100
    assert missing == 0
    assert names(target) == ["99"]
    assert names(tmp_path) == ["out"]


def test_a_resumed_folder_replaces_too(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def interrupted() -> None:
        with atomic.new_folder(target, force=True, key="0123456789") as scratch:
            (scratch / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == [".out.resume-01234567", "out"]
    with atomic.new_folder(target, force=True, key="0123456789") as scratch:
        assert names(scratch) == ["new"]
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_a_kept_folder_stays_until_another_command_writes(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def interrupted() -> None:
        with atomic.kept_folder(target, "0011223344556677") as kept:
            (kept / "part").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with atomic.kept_folder(target, "0011223344556677") as kept:
        assert names(kept) == ["part"]
        with (
            pytest.raises(OutputRefused, match="being written by another process"),
            atomic.kept_folder(target, "0011223344556677"),
        ):
            pass
        with atomic.new_folder(target) as scratch:  # it is locked, so this does not remove it
            (kept / "part").rename(scratch / "part")
    assert names(tmp_path) == [".out.pull-0011223344556677", "out"]
    with atomic.new_folder(target, force=True):
        pass
    assert names(tmp_path) == ["out"]
