"""An adapter that a task opens again is read once, as long as its files are what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools import dialects
from loratools.decisions import warnings_to
from loratools.dialects import open_adapter, peft
from loratools.errors import LoraToolsError
from loratools.format import digest
from loratools.format.digest import adapter_digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import session
from loratools.surgery.combine import combine
from tests.make import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_peft(tmp_path / "adapter", tiny.lora_factors())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where PEFT's dialect reads an adapter."""
    reads: list[Path] = []
    read = peft.read
    monkeypatch.setattr(peft, "read", lambda listing: reads.append(listing.path) or read(listing))
    return reads


def test_a_task_reads_it_once_and_none_keeps_it(folder: Path, reads: list[Path]) -> None:
    with session():
        first = open_adapter(folder)
        assert open_adapter(folder) is first
        assert open_adapter(folder, initial=True) is first
    assert len(reads) == 1
    assert open_adapter(folder) is not open_adapter(folder)
    with session():
        assert open_adapter(folder) is not first
    assert len(reads) == 4


def test_other_options_and_other_files_are_read_anew(folder: Path, reads: list[Path]) -> None:
    with session():
        before = open_adapter(folder)
        told = open_adapter(folder, alpha=3.0)
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
        after = open_adapter(folder)
    scalings = [next(iter(adapter.updates.values())).scaling for adapter in (before, told, after)]
    assert scalings == [2.0, 0.75, 4.0]
    assert len(reads) == 3


def test_its_warnings_reach_whoever_opens_it(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(b"no tensors")
    heard: list[list[str]] = [[], []]
    with session():
        for each in heard:
            with warnings_to(each.append):
                open_adapter(folder, alpha=3.0)
    assert heard[0]
    assert heard[0] == heard[1]


def test_what_is_refused_is_refused_again(tmp_path: Path) -> None:
    folder = tiny.save_peft(tmp_path / "adapter", tiny.lora_factors(), init_lora_weights="pissa")
    with session():
        for _ in range(2):
            with pytest.raises(LoraToolsError, match="pissa"):
                open_adapter(folder)
        opened = open_adapter(folder, initial=True)
        assert open_adapter(folder, initial=True) is opened
        with pytest.raises(LoraToolsError, match="pissa"):
            open_adapter(folder)


def test_a_task_works_a_digest_out_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    chunks_of_all = digest.chunks_of_all
    monkeypatch.setattr(digest, "chunks_of_all", lambda *args: counted.append("") or chunks_of_all(*args))
    with session():
        assert adapter_digest(open_adapter(folder)) == adapter_digest(open_adapter(folder))
        assert len(counted) == 1
    assert adapter_digest(open_adapter(folder)) == adapter_digest(open_adapter(folder))
    assert len(counted) == 3


def test_the_same_files_have_their_digest_once_however_they_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(tiny.save_llama(tmp_path / "base", tiny.llama_weights()))
    read: list[str] = []
    chunks_of_all = digest.chunks_of_all
    monkeypatch.setattr(digest, "chunks_of_all", lambda *args: read.append("") or chunks_of_all(*args))
    with session():
        before = adapter_digest(open_adapter(folder))
        for others in ({"base": base}, {"alpha": 9.0}):
            assert adapter_digest(open_adapter(folder, **others)) == before
        assert len(read) == 1
        other = tiny.save_peft(tmp_path / "other", tiny.lora_factors(seed=7))
        (other / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")
        changed = adapter_digest(open_adapter(folder, base=base))
        assert len(read) == 2
    assert before != changed == adapter_digest(open_adapter(folder))


def test_combining_opens_each_adapter_once(folder: Path, reads: list[Path], tmp_path: Path) -> None:
    with session():
        dialects.open_adapter(folder)
        combine([folder, folder], tmp_path / "sum")
    assert len(reads) == 1
