"""What systems differ in: a new file has its length and reads as zeros, and its blocks are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from loratools.storage import files
from loratools.storage.atomic import system


@pytest.mark.parametrize("size", [0, 1, 5_000_001])
def test_a_new_file_has_its_length_and_reads_as_zeros(size: int, tmp_path: Path) -> None:
    path = tmp_path / "new"
    with files.descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
        system.make_room(target, size)
    assert path.read_bytes() == bytes(size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says how many blocks a file has")
def test_its_blocks_are_reserved_where_a_sparse_file_would_have_none(tmp_path: Path) -> None:
    with files.descriptor(tmp_path / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
        if system._reserves(target) is None:
            pytest.skip("this file system is memory")
        try:
            os.posix_fallocate(target, 0, 1 << 20)
        except OSError:
            pytest.skip("this file system reserves nothing")
        os.ftruncate(target, 0)
        system.make_room(target, 1 << 20)
        assert os.fstat(target).st_blocks * 512 >= 1 << 20


def test_nothing_is_reserved_in_memory() -> None:
    """There it costs as much as to write zeros."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system is known to be memory here")
    with NamedTemporaryFile(dir="/dev/shm") as file:
        system.make_room(file.fileno(), 1 << 20)
        status = os.fstat(file.fileno())
    assert (status.st_size, status.st_blocks) == (1 << 20, 0)


def test_a_descriptor_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"1234")
    with files.descriptor(tmp_path / "there") as source, pytest.raises(OSError):
        system.make_room(source, 8)
    assert (tmp_path / "there").read_bytes() == b"1234"
