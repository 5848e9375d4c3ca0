"""A part of a file read as a file: positions, ends, and a torch.save file inside another."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from loratools.errors import BadFile
from loratools.storage.files import read_tensor
from loratools.storage.pickles.archive import read_pickled
from loratools.storage.pickles.window import Window


def test_it_reads_as_the_part_alone_would() -> None:
    whole = bytes(range(100))
    window, alone = Window(io.BytesIO(whole), 20, 70), io.BytesIO(whole[20:70])
    for offset, whence in ((0, os.SEEK_SET), (7, os.SEEK_SET), (3, os.SEEK_CUR), (-5, os.SEEK_END), (9, os.SEEK_END)):
        assert window.seek(offset, whence) == alone.seek(offset, whence)
        assert window.read(4) == alone.read(4)
        assert window.tell() == alone.tell()
    window.seek(0)
    assert window.read() == whole[20:70]
    with pytest.raises(ValueError, match="before the first byte"):
        window.seek(-1)


def test_a_checkpoint_inside_another_file(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "alone.pt")
    inner = (tmp_path / "alone.pt").read_bytes()
    path = tmp_path / "outer"
    path.write_bytes(b"x" * 777 + inner + b"y" * 4096)
    specs = read_pickled(path, (777, 777 + len(inner)))
    assert specs.keys() == state.keys()
    assert all(torch.equal(read_tensor(specs[name]), tensor) for name, tensor in state.items())
    with pytest.raises(BadFile, match="damaged or truncated"):
        read_pickled(path, (777, 777 + len(inner) - 30))
    with pytest.raises(BadFile, match="not a zip file"):
        read_pickled(path, (0, len(inner)))
