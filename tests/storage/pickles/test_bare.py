"""Pickles that are in no zip: the refusal names what they would have run, and nothing runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.errors import BadFile
from loratools.storage.pickles.archive import read_pickled
from loratools.storage.pickles.bare import foreign


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def refusal(path: Path) -> str:
    with pytest.raises(BadFile) as refused:
        dialects.open_adapter(path)
    with pytest.raises(BadFile) as read:
        read_pickled(path)
    assert refused.value.message == read.value.message
    return refused.value.message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [Evil(), {"a": Evil()}, {"a": torch.Size([2]), "b": [Evil()]}], ids=["x", "a", "b"])
def test_code_is_named_in_every_protocol(
    value: object, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(value, protocol))
    assert refusal(path).endswith("evil.pt: this pickle holds more than tensors and will not be opened: posix.mkdir")
    path.write_bytes(path.read_bytes()[:-1])  # it would run before its end is missed
    assert refusal(path).endswith("will not be opened: posix.mkdir")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "raw", [b"(S'hacked'\niposix\nmkdir\n.", b"(cposix\nmkdir\nS'hacked'\no.", b"cposix\nmkdir\n."]
)
def test_code_of_old_operations(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    path.write_bytes(raw)
    assert refusal(path).endswith("will not be opened: posix.mkdir")


def test_the_format_from_before_pytorch_1_6(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2, 2), "b": Evil()}, path, _use_new_zipfile_serialization=False)
    assert refusal(path).endswith("will not be opened: posix.mkdir")
    torch.save({"a": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    assert "the format from before PyTorch 1.6" in refusal(path)


@pytest.mark.parametrize("raw", [b"", b"cposix\nmkdir\n", b"copy this\nand that\n", bytes(66), pickle.dumps({"a": 1})])
def test_what_asks_for_nothing(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    assert foreign(path, 0, len(raw)) is None
    assert "not a zip file of torch.save" in refusal(path)


def test_a_small_zip_with_code_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}, 2))
        archive.writestr("archive/version", "3\n")
    assert path.stat().st_size < 1024
    assert refusal(path).endswith("will not be opened: posix.mkdir")
