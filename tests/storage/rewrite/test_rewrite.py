"""Files are changed where they stand: the old or the new, also for who is killed, and never other data."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools.decisions import warnings_to
from loratools.errors import BadFile, OutputRefused
from loratools.storage.atomic import system
from loratools.storage.header import encode_header, read_header
from loratools.storage.rewrite import How, NewHeader, editing, finish, scratch_of
from loratools.storage.rewrite.apply import PLAN
from loratools.storage.rewrite.header import LARGE, data_start, write_copy
from loratools.storage.sources import session
from tests.faults.killer import watch

X = torch.arange(1000, dtype=torch.float32)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a header is written over the old one on Linux only")


def small(path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({"x": X, "y": X[:3].clone()}, path, metadata=metadata or {"format": "pt"})
    return path


def large(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file over the limit that takes no room on the disk: zeros but for its ends."""
    with path.open("wb") as file:
        file.write(encode_header([("x", "U8", (LARGE,), LARGE)], metadata or {"format": "pt"}))
        start = file.tell()
        file.write(b"begin")
        file.truncate(start + LARGE)
        file.seek(start + LARGE - 3)
        file.write(b"end")
    return path


def data(path: Path) -> tuple[int, bytes, bytes]:
    """How many bytes of data a file has, its first ones and its last."""
    start, size = data_start(path), path.stat().st_size
    with path.open("rb") as file:
        file.seek(start)
        first = file.read(10_000)
        file.seek(max(start, size - 10_000))
        return size - start, first, file.read()


def put(path: Path, metadata: dict[str, str], **others: bytes) -> dict[str, How]:
    with session(), editing(path) as held:
        return held.commit({path.name: NewHeader.of(path, read_header(path), metadata), **others})


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


METADATA = ({"a": "b"}, {"a": "b" * 9000}, {"a": "c" * 20000, "d": "e"}, {"format": "pt"})


@pytest.mark.parametrize(("make", "how"), [(small, "replaced"), (large, "header")])
def test_data_stay_and_other_metadata_come(tmp_path: Path, make: Callable, how: str) -> None:
    path = make(tmp_path / "a.safetensors")
    kept = data(path)
    path.chmod(0o640)
    for metadata in METADATA:
        done = put(path, metadata)
        assert said(path) == metadata
        assert data(path) == kept
        assert done == {path.name: how} or sys.platform != "linux"
        assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@LINUX
def test_room_in_a_long_header_is_used_again(tmp_path: Path) -> None:
    path = large(tmp_path / "a.safetensors")
    put(path, {"a": "b" * 9000})
    size, inode = path.stat().st_size, path.stat().st_ino
    put(path, {"c": "d" * 8000})
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode)
    with path.open("rb") as file:
        assert b"bbbb" not in file.read(data_start(path))


def test_several_files_change_together(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    assert put(path, {"a": "b"}, **{"README.md": b"new", "config.json": b"{}"}).keys() == {
        path.name, "README.md", "config.json",
    }  # fmt: skip
    assert (tmp_path / "README.md").read_bytes() == b"new"
    assert said(path) == {"a": "b"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to(path)
    before = path.read_bytes()
    with pytest.raises(OutputRefused, match=r"b\.safetensors is a symbolic link"):
        put(tmp_path / "b.safetensors", {"a": "b"})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("make", [small, large])
def test_other_names_of_a_file_keep_the_old(tmp_path: Path, make: Callable) -> None:
    path = make(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").hardlink_to(path)
    told: list[str] = []
    with warnings_to(told.append):
        put(path, {"a": "b"})
    assert "2 names (hard links)" in told[0]
    assert (said(path), said(tmp_path / "b.safetensors")) == ({"a": "b"}, {"format": "pt"})


def test_who_comes_second_is_told_so(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    with editing(path), pytest.raises(OutputRefused, match="is being edited by another process"):
        put(path, {"a": "b"})
    put(path, {"a": "b"})
    assert said(path) == {"a": "b"}


def test_a_file_that_changes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    with session(), editing(path) as held:
        header = NewHeader.of(path, read_header(path), {"a": "b"})
        small(path, {"by": "another"})
        with pytest.raises(BadFile, match="changed while they were read"):
            held.commit({path.name: header})
    assert said(path) == {"by": "another"}


def test_a_header_that_no_reader_takes_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    with pytest.raises(BadFile, match="safetensors allows"):
        put(path, {"a": "b" * 100_000_001})
    assert said(path) == {"format": "pt"}


def killed(path: Path, moment: int, others: dict[str, bytes]) -> bool:
    """Edit in a forked process that kills itself at an event; return whether it got so far."""
    if process := os.fork():
        _, status = os.waitpid(process, 0)
        return os.WIFSIGNALED(status)
    count = 0

    def event() -> None:
        nonlocal count
        count += 1
        if count > moment:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(event)
    put(path, {"new": "x" * 5000}, **others)
    os._exit(0)


def settled(path: Path) -> None:
    """Wait until nobody works on a file, as its lock says."""
    if (scratch := scratch_of(path)).exists():
        descriptor = os.open(scratch, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.close(descriptor)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("make", "others"), [(small, {}), (small, {"README.md": b"new"}), (large, {})])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, make: Callable, others: dict[str, bytes]
) -> None:
    moment, results = 0, set()
    while True:
        folder = tmp_path / f"{moment}"
        folder.mkdir()
        path = make(folder / "a.safetensors")
        kept = data(path)
        went_on = killed(path, moment, others)
        settled(path)
        found = said(path)  # any reader opens it
        assert found in ({"format": "pt"}, {"new": "x" * 5000})
        assert data(path) == kept
        finish(path)
        results.add((len(said(path)), *((folder / name).exists() for name in others)))
        put(path, {"last": "one"})
        assert (said(path), data(path)) == ({"last": "one"}, kept)
        assert {each.name for each in folder.iterdir()} <= {path.name, *others}
        if not went_on:
            break
        moment += 1
    assert moment > 5
    assert len(results) <= 2  # all files old, or all new


@LINUX
def test_what_a_power_cut_leaves_is_brought_to_its_end(tmp_path: Path) -> None:
    path = large(tmp_path / "a.safetensors")
    kept, scratch = data(path), scratch_of(path)
    header = NewHeader.of(path, read_header(path), {"a": "b" * 9000})
    scratch.mkdir()
    (scratch / "0").write_bytes(header.encoded)
    grow = len(header.encoded) - data_start(path)
    step = {"header": "0", "of": path.name, "size": path.stat().st_size, "inode": path.stat().st_ino, "grow": grow}
    (scratch / PLAN).write_text(json.dumps({"steps": [step]}))
    with path.open("r+b") as file:  # half of the header is written
        file.write(b" " * 20)
    with pytest.raises(BadFile, match="an edit of it was cut short") as refused:
        read_header(path)
    assert "loratools edit" in (refused.value.hint or "")
    told: list[str] = []
    with warnings_to(told.append):
        finish(path)
    assert "brought to its end" in told[0]
    assert (said(path), data(path)) == ({"a": "b" * 9000}, kept)
    assert not scratch.exists()


def test_a_plan_for_a_file_that_is_gone_is_dropped(tmp_path: Path) -> None:
    path = small(tmp_path / "a.safetensors")
    scratch = scratch_of(path)
    scratch.mkdir()
    (scratch / "0").write_bytes(b"x")
    step = {"header": "0", "of": path.name, "size": 1, "inode": 1, "grow": 0}
    (scratch / PLAN).write_text(json.dumps({"steps": [step]}))
    told: list[str] = []
    with warnings_to(told.append):
        finish(path)
    assert "is dropped" in told[1]
    assert said(path) == {"format": "pt"}
    assert not scratch.exists()


@pytest.mark.parametrize("offset", [4096, 100])
def test_blocks_are_shared_whole_or_not_at_all(tmp_path: Path, offset: int) -> None:
    path = large(tmp_path / "a")
    wanted = path.read_bytes()[4096:]
    target = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    with path.open("rb") as source:
        shared = system.shares(source.fileno(), 4096, target, offset)
        assert not system.shares(source.fileno(), 100, target, 4096)
    os.close(target)
    found = (tmp_path / "b").read_bytes()
    assert found == (bytes(4096) + wanted if shared else b"")
    assert not (shared and offset % 4096)


@pytest.mark.parametrize("grow", [0, 9000])
def test_a_copy_with_another_header_has_room_for_no_more_than_its_bytes(tmp_path: Path, grow: int) -> None:
    path, made = large(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    header = NewHeader.of(path, read_header(path), {"a": "b" * grow})
    write_copy(path, header, made)
    assert data(made) == data(path)
    assert made.stat().st_size == len(header.encoded) + LARGE
    assert read_header(made).metadata == {"a": "b" * grow}
