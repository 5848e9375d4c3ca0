"""Positioned reads and copies: complete or a sentence, whatever the system calls return."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage import files
from loratools.storage.atomic import system
from loratools.storage.header import TensorSpec

DATA = bytes(range(256)) * 20_000  # 5 MB: several chunks


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def copied(source: Path, start: int, stop: int, offset: int) -> bytes:
    target = source.with_name("target")
    target.unlink(missing_ok=True)
    with files.descriptor(source) as opened, files.descriptor(target, os.O_RDWR | os.O_CREAT) as out:
        files.copy_range(opened, start, stop, out, offset, source)
    return target.read_bytes()


def test_short_reads_and_writes_are_continued(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call may do less than it was asked; here each does at most a thousand bytes."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:1000]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:999], at))
    buffer = bytearray(10_001)
    with files.descriptor(source) as opened:
        files.read_into(opened, memoryview(buffer), 77)
    assert bytes(buffer) == DATA[77:10_078]
    target = source.with_name("target")
    with files.descriptor(target, os.O_RDWR | os.O_CREAT) as out:
        files.write_from(out, memoryview(buffer), 5)
    assert target.read_bytes() == bytes(5) + bytes(buffer)


def test_the_end_of_a_file_is_a_sentence(source: Path) -> None:
    with files.descriptor(source) as opened, pytest.raises(BadFile, match=r"source: became shorter .* 5120000"):
        files.read_into(opened, memoryview(bytearray(100)), len(DATA) - 50, source)
    spec = TensorSpec("U8", (100,), source, len(DATA) - 50, len(DATA) + 50)
    for read in (files.read_bytes, files.read_tensor, lambda spec: list(files.chunks(spec))):
        with pytest.raises(BadFile, match="source: became shorter"):
            read(spec)  # type: ignore[operator]
    with pytest.raises(BadFile, match="source: became shorter while it was"):
        copied(source, len(DATA) - 50, len(DATA) + 50, 0)
    with (
        pytest.raises(BadFile, match=r"nothing: cannot be read: No such file"),
        files.descriptor(source.parent / "nothing"),
    ):
        pass


RANGES = [(0, len(DATA), 0), (1, len(DATA) - 1, 12_345), (500, 500, 0), (7, 8, 3), (100, 3_000_100, 1)]


@pytest.mark.parametrize("number", [None, 0, errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize(("start", "stop", "offset"), RANGES)
def test_copies_with_and_without_the_kernel(
    source: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, start: int, stop: int, offset: int
) -> None:
    """`number` 0: there is no such call; else it fails with this error after a first piece; None: it works."""
    calls = []
    if number:
        monkeypatch.setattr(system, "copies_well", lambda *_: True)
    if number == 0:
        monkeypatch.delattr(os, "copy_file_range")
    elif number is not None:
        kernel = os.copy_file_range

        def partly(source: int, target: int, count: int, at: int, to: int) -> int:
            calls.append(count)
            if len(calls) > 1:
                raise OSError(number, os.strerror(number))
            return kernel(source, target, min(count, 1001), at, to)

        monkeypatch.setattr(os, "copy_file_range", partly)
    expected = bytes(offset) + DATA[start:stop] if stop > start else b""
    assert copied(source, start, stop, offset) == expected
    if number and stop - start > 1001:
        assert len(calls) == 2  # after the refusal it is not asked again


def test_the_kernel_copies_whole_blocks_and_between_machines(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.descriptor(source) as opened:
        for device, unaligned in ((os.makedev(0, 45), True), (os.makedev(254, 0), False)):  # of NFS, say, and of a disk
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", lambda _, device=device: SimpleNamespace(st_dev=device))
                asked = [system.copies_well(opened, *at) for at in ((0, 8192), (8, 8), (4096, 1), (1, 0))]
            assert asked == [True, unaligned, unaligned, unaligned]
        monkeypatch.delattr(os, "copy_file_range")
        assert not system.copies_well(opened, 0, 0)


def test_other_errors_of_the_kernel_are_raised(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        copied(source, 0, 100, 0)


@pytest.mark.parametrize("size", [1, 999, 1 << 20, 1 << 30])
def test_chunks_are_the_tensor_s_bytes(source: Path, size: int) -> None:
    spec = TensorSpec("U8", (5000,), source, 33, 5033)
    pieces = [bytes(piece) for piece in files.chunks(spec, size)]
    assert b"".join(pieces) == DATA[33:5033]
    assert max(map(len, pieces)) == min(size, 5000)
    assert bytes(files.read_bytes(spec)) == DATA[33:5033]
    assert list(files.chunks(TensorSpec("U8", (0,), source, 33, 33), size)) == []


def test_tensors_have_their_dtype_and_shape(source: Path) -> None:
    expected = torch.frombuffer(bytearray(DATA[3:27]), dtype=torch.float32).view(2, 3)
    found = files.read_tensor(TensorSpec("F32", (2, 3), source, 3, 27))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert files.read_tensor(TensorSpec("BF16", (), source, 2, 4)).shape == ()
    empty = files.read_tensor(TensorSpec("I64", (3, 0, 2), source, 8, 8))
    assert (empty.shape, empty.dtype) == ((3, 0, 2), torch.int64)
    with pytest.raises(UnsupportedAdapter, match="no array of dtype F4"):
        files.read_tensor(TensorSpec("F4", (2,), source, 0, 1))


def test_no_descriptor_is_left_open(source: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        with pytest.raises(ValueError, match="x"), files.descriptor(source):
            raise ValueError("x")
        list(files.chunks(TensorSpec("U8", (10,), source, 0, 10)))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("nbytes", [1, 200, 1 << 20])
def test_row_tiles_give_every_row_of_both_tensors_once(tmp_path: Path, nbytes: int) -> None:
    tensors = [torch.arange(7 * 11).view(7, 11).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    specs = []
    for i, (tensor, dtype) in enumerate(zip(tensors, ("BF16", "F32"), strict=True)):
        raw = b"before" + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        (tmp_path / str(i)).write_bytes(raw)
        specs.append(TensorSpec(dtype, (7, 11), tmp_path / str(i), 6, len(raw)))
    seen, firsts = ([], []), []
    for first, pieces, rows in files.row_tiles(specs, 11, nbytes):
        firsts.append(first)
        for i, (piece, tile) in enumerate(zip(pieces, rows, strict=True)):
            assert bytes(piece) == tile.view(torch.uint8).numpy().tobytes()
            seen[i].append(tile.clone())
    assert firsts == list(range(0, 7, max(1, nbytes // 44)))
    assert all(torch.equal(torch.cat(tiles), tensor) for tiles, tensor in zip(seen, tensors, strict=True))
    os.truncate(specs[1].file, 200)
    with pytest.raises(BadFile, match="became shorter while it was read"):
        list(files.row_tiles(specs, 11, nbytes))
