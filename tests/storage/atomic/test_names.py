"""Names that Windows or a file system without upper and lower case cannot hold: known everywhere, refused there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import loratools
from loratools.errors import BadFile
from loratools.storage.atomic import names
from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub
from tests.hub.trips import REPO, fetch
from tests.make import tiny

__all__ = ["hub", "hub_home"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CON", "CON is a device there"), ("aux.txt", "aux is a device there"), ("nul.tar.gz", "nul is a device"),
        ("sub/Com1.json", "Com1 is a device"), ("LPT¹", "LPT¹ is a device"), ("conin$", r"conin\$ is a device"),
        ("prn .txt", "prn  is a device"), ("weights.", "lost there"), ("weights /x", "lost there"),
        ("a:b", "':' is in no name"), ("model.safetensors::$DATA", "':'"), ("a\\b", "in no name"),
        ("a\tb", "in no name"), ("what?", "in no name"), ("é" * 256, "at most 255"),
    ],
)  # fmt: skip
def test_names_that_windows_cannot_write(name: str, reason: str) -> None:
    import re

    assert re.search(reason, names.fault(name) or "")


@pytest.mark.parametrize(
    "name",
    ["console.txt", "auxiliary", "com0x", "lpt10", ".gitattributes", "a..b", "sub/.hidden", "model-00001-of-00002.bin",
     "é" * 255, "CONfig.json"],
)  # fmt: skip
def test_names_that_every_system_can_write(name: str) -> None:
    assert names.fault(name) is None


def test_names_that_are_one_where_case_is_nothing() -> None:
    assert names.clashes(["Model.bin", "model.bin", "STRASSE", "straße", "other"]) == [
        ["Model.bin", "model.bin"], ["STRASSE", "straße"],
    ]  # fmt: skip
    assert names.clashes(["e\u0301", "é"]) == [["e\u0301", "é"]]
    assert names.faults(["a", "A", "nul"]) == ["'nul': nul is a device there", "'A' and 'a': one name there"]


def test_a_folder_tells_whether_case_counts(tmp_path: Path) -> None:
    folder = tmp_path / "Folder"
    folder.mkdir()
    assert not names.ignores_case(folder)
    (tmp_path / "fOLDER").symlink_to(folder)  # as it looks where case is nothing
    assert names.ignores_case(folder)


def strange(folder: Path) -> Path:
    """A base whose second shard is called `aux.safetensors`, and that has a file `notes:1.txt`."""
    tiny.save_llama(folder / "base", tiny.llama_weights())
    index = folder / "base" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    old = sorted(set(document["weight_map"].values()))[1]
    document["weight_map"] = {k: "aux.safetensors" if v == old else v for k, v in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    (folder / "base" / old).rename(folder / "base" / "aux.safetensors")
    (folder / "base" / "notes:1.txt").write_text("notes")
    tiny.save_peft(folder / "adapter", tiny.lora_factors())
    return folder


def test_an_output_that_cannot_travel_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = strange(tmp_path)
    loratools.merge(folder / "base", folder / "adapter", folder / "merged")
    assert (folder / "merged" / "aux.safetensors").is_file()
    assert "not every system can hold it: on Windows 'aux.safetensors': aux is a device there" in caplog.text
    assert "'notes:1.txt'" in caplog.text


def test_windows_opens_no_device_for_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = strange(tmp_path)
    monkeypatch.setattr(names, "WINDOWS", True)
    with pytest.raises(BadFile, match=r"aux\.safetensors.*plain file name"):
        loratools.merge(folder / "base", folder / "adapter", folder / "merged")
    assert not (folder / "merged").exists()


def test_windows_restores_no_file_that_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = strange(tmp_path)
    loratools.merge(folder / "base", folder / "adapter", folder / "kept", keep_residual=True)
    whole = Path(shutil.copytree(folder / "kept", folder / "travelled"))
    (whole / "aux.safetensors").rename(whole / "other.safetensors")
    index = whole / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("aux.safetensors", "other.safetensors"))
    monkeypatch.setattr(names, "WINDOWS", True)
    with pytest.raises(BadFile, match="1 of its names cannot be written on Windows"):
        loratools.unmerge(whole, folder / "adapter", folder / "back")
    assert not (folder / "back").exists()


def test_pull_refuses_names_before_it_fetches(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.seed(REPO, files | {"aux.json": b"{}", "Notes.json": b"{}", "notes.json": b"[]"})
    fetch(tmp_path / "here")
    assert "'aux.json': aux is a device there; 'Notes.json' and 'notes.json': one name there" in caplog.text
    monkeypatch.setattr(names, "WINDOWS", True)
    with pytest.raises(BadFile, match="2 of its names cannot be written on Windows") as caught:
        fetch(tmp_path / "there")
    assert "'aux.json': aux is a device there" in caught.value.problems[0]
    monkeypatch.setattr(names, "WINDOWS", False)
    monkeypatch.setattr(names, "ignores_case", lambda _: True)
    with pytest.raises(BadFile, match="one name on this file system"):
        fetch(tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir() if "there" in path.name) == []
