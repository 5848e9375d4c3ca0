"""gs:// and az:// do what s3:// does: inspected by headers, merged and extracted from and to, resumed after a cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loratools import extract_svd, hash, inspect, merge
from loratools.errors import BadFile, StoreError
from loratools.storage.stores import address, client
from tests.storage.stores.clouds import Azure, Google, azurite
from tests.storage.stores.server import Rule

pytestmark = pytest.mark.interop

Cloud = Google | Azure


@pytest.fixture(scope="module", params=["gs", "az"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Cloud]]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    if request.param == "az" and azurite() is None:
        pytest.skip("azurite is not installed: npm install azurite, and its main.js in AZURITE_MAIN")
    made = (Google if request.param == "gs" else Azure)(tmp_path_factory.mktemp("cloud"))
    yield request.param, made
    made.close()


@pytest.fixture
def cloud(running: tuple[str, Cloud], prepared: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Cloud]:
    """A scheme, and its server with a copy of the base and the adapter."""
    scheme, server = running
    server.reset()
    monkeypatch.setitem(client._RETRIES, "max_retries", 1)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    for name in ("base", "adapter"):
        server.put(prepared / name, f"in/{name}")
    return scheme, server


def _same(server: Cloud, key: str, folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert server.objects(f"{key}/") == {f"{key}/{name}": data for name, data in files.items()}


def test_headers_alone_are_moved(cloud: tuple[str, Cloud], prepared: Path) -> None:
    scheme, server = cloud
    assert inspect(f"{scheme}://bucket/in/base").total == inspect(prepared / "base").total
    ranges = [each.range for each in server.log.of("GET") if each.path.endswith(".safetensors")]
    assert all(ranges)
    assert hash(f"{scheme}://bucket/in/base") == hash(prepared / "base")


def test_a_merge_and_an_extraction_from_it_and_to_it(cloud: tuple[str, Cloud], prepared: Path, tmp_path: Path) -> None:
    scheme, server = cloud
    merge(prepared / "base", prepared / "adapter", tmp_path / "here")
    merge(f"{scheme}://bucket/in/base", f"{scheme}://bucket/in/adapter", f"{scheme}://bucket/out/model")
    _same(server, "out/model", tmp_path / "here")
    extract_svd(prepared / "base", tmp_path / "here", tmp_path / "factors", ranks=2)
    extract_svd(f"{scheme}://bucket/in/base", f"{scheme}://bucket/out/model", f"{scheme}://bucket/out/factors", ranks=2)
    weights = "adapter_model.safetensors"
    assert server.objects(f"out/factors/{weights}") == {
        f"out/factors/{weights}": (tmp_path / "factors" / weights).read_bytes()
    }


def test_a_cut_upload_is_no_model_and_goes_on(cloud: tuple[str, Cloud], prepared: Path, tmp_path: Path) -> None:
    scheme, server = cloud
    merge(prepared / "base", prepared / "adapter", tmp_path / "here")
    second = server.path("o/model/model-00002")
    server.log.rules.append(Rule(lambda request: request.method == "PUT" and second in request.path, 1000, 500))
    with pytest.raises(StoreError, match="the store has a fault of its own"):
        merge(f"{scheme}://bucket/in/base", prepared / "adapter", f"{scheme}://bucket/o/model")
    assert sorted(server.objects("o/")) == [
        "o/model/.loratools-upload.json",
        "o/model/model-00001-of-00002.safetensors",
    ]
    with pytest.raises(BadFile, match="an output that is not finished"):
        inspect(f"{scheme}://bucket/o/model")
    server.log.clear()
    report = merge(f"{scheme}://bucket/in/base", prepared / "adapter", f"{scheme}://bucket/o/model")
    assert report.reused == ("model-00001-of-00002.safetensors",)
    assert not [each for each in server.log.of("PUT") if "model-00001" in each.path]
    _same(server, "o/model", tmp_path / "here")


def test_a_range_that_is_cut_is_asked_for_again(cloud: tuple[str, Cloud], prepared: Path, tmp_path: Path) -> None:
    scheme, server = cloud
    merge(prepared / "base", prepared / "adapter", tmp_path / "here")
    server.log.rules.append(
        Rule(lambda request: request.method == "GET" and request.path.endswith("2.safetensors"), 1, cut=100)
    )
    merge(f"{scheme}://bucket/in/base", prepared / "adapter", tmp_path / "there")
    weights = "model-00002-of-00002.safetensors"
    assert (tmp_path / "there" / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()
    assert server.log.rules[0].times == 0


def test_a_large_file_goes_in_parts_and_whole(cloud: tuple[str, Cloud], tmp_path: Path) -> None:
    scheme, server = cloud
    data = bytes(range(256)) * (80 << 10)
    (tmp_path / "large").write_bytes(data)
    store = client.Store(address.parse(f"{scheme}://bucket/o"))
    sent = store.put("o/large", tmp_path / "large", len(data))
    assert sent.size == len(data)
    assert len([each for each in server.log.of("PUT") if "o/large" in each.path]) >= 3
    assert bytes(store.part(sent, 9_000_000, 9_000_512)) == data[9_000_000:9_000_512]
    assert server.objects("o/large") == {"o/large": data}
    store.remove(["o/large"])
    assert (server.objects("o/"), store.head("o/large")) == ({}, None)


def test_what_is_not_there_is_a_sentence(cloud: tuple[str, Cloud]) -> None:
    scheme, _ = cloud
    with pytest.raises((StoreError, BadFile), match=f"^{scheme}://bucket/nowhere"):
        inspect(f"{scheme}://bucket/nowhere")
    with pytest.raises(StoreError, match=f"^{scheme}://elsewhere/base: no such bucket\\nCheck its name") as refused:
        inspect(f"{scheme}://elsewhere/base")
    assert "AWS" not in str(refused.value)
