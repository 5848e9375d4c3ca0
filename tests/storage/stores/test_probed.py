"""Servers of files: by the address of a file, or of a folder with the usual names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratools import hash, inspect, merge, validate
from loratools.errors import BadFile, StoreError
from loratools.storage.stores import skeleton
from tests.storage.stores.server import Files

pytest.importorskip("obstore")


@pytest.fixture
def web(prepared: Path) -> Iterator[Files]:
    """A server of the prepared folder."""
    server = Files(prepared)
    yield server
    server.close()


def test_a_folder_is_asked_for_by_the_usual_names(prepared: Path, web: Files, tmp_path: Path) -> None:
    assert hash(f"{web.address}/base") == hash(prepared / "base")
    assert validate(f"{web.address}/sealed", f"{web.address}/base").valid
    merge(f"{web.address}/base", f"{web.address}/adapter", tmp_path / "there")
    merge(prepared / "base", prepared / "adapter", tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


def test_a_file_by_its_address_with_what_is_signed(prepared: Path, web: Files) -> None:
    signed = web.address.replace("://", "://me:word@")
    summary = inspect(f"{signed}/adapter/adapter_model.safetensors?X-Amz-Signature=abc")
    assert summary.total == inspect(prepared / "adapter" / "adapter_model.safetensors").total
    asked = web.log.of("GET", "adapter_model.safetensors")
    assert {request.query for request in asked} == {"X-Amz-Signature=abc"}
    assert hash(f"{web.address}/base/model.safetensors.index.json") == hash(prepared / "base")
    with pytest.raises(BadFile) as caught:
        inspect(f"{signed}/none/model.safetensors?X-Amz-Signature=abc")
    assert str(caught.value).startswith(f"{web.address}/none/model.safetensors: no file, and no folder of an adapter")
    assert "abc" not in str(caught.value)


def test_headers_alone_are_moved(prepared: Path, web: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "FIRST", 1 << 10)
    inspect(f"{web.address}/base")
    size = sum(path.stat().st_size for path in (prepared / "base").iterdir())
    assert web.log.sent < 10_000 < size
    assert all(request.range for request in web.log.of("GET"))


def test_a_server_without_ranges_is_refused(prepared: Path, tmp_path: Path) -> None:
    server = Files(prepared, ranges=False)
    with pytest.raises(StoreError, match=r"^http://127.0.0.1:\d+/base/\S+: it cannot be read in parts: "):
        inspect(f"{server.address}/base")
    server.close()


def test_a_file_that_changes_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(skeleton, "FIRST", 1 << 10)
    server = Files(workplace)
    file = workplace / "base" / "model-00001-of-00002.safetensors"

    def touch(request: object) -> bool:
        if server.log.of("GET", "model-00002"):
            os.utime(file, ns=(0, 0))
        return False

    from tests.storage.stores.server import Rule

    server.log.rules.append(Rule(touch))
    with pytest.raises(StoreError, match=r"^http://127.0.0.1:\d+/base/model-00001-\S+: changed while it was read"):
        merge(f"{server.address}/base", workplace / "adapter", tmp_path / "out")
    server.close()
    assert not (tmp_path / "out").exists()
