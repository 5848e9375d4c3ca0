"""What a store answers is checked; what fails passes, or becomes a sentence that gives nothing away."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier

import pytest

from loratools import hash, inspect, merge
from loratools.errors import BadFile, LoraToolsError, MissingExtra, StoreError
from loratools.storage.stores import client, ranges, skeleton
from loratools.storage.stores.address import parse
from loratools.storage.stores.client import Store
from tests.storage.stores.server import S3, Request, Rule

pytestmark = pytest.mark.interop


@pytest.fixture
def place(prepared: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder, of which the bucket has a copy; nearly all of it is read by ranges."""
    monkeypatch.setattr(skeleton, "FIRST", 1 << 10)
    monkeypatch.setitem(client._RETRIES, "max_retries", 1)
    for name in ("base", "adapter"):
        s3.put(prepared / name, name)
    return prepared


def _data(request: Request) -> bool:
    """A request for numbers of the first shard."""
    return "model-00001" in request.path and request.method == "GET" and request.range not in (None, "bytes=0-1023")


def _refused(call: Callable[[], object], s3: S3) -> str:
    with pytest.raises(StoreError) as caught:
        call()
    text = str(caught.value)
    for secret in (s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"], s3.endpoint, "127.0.0.1", "Debug"):
        assert secret not in text
    return text


@pytest.mark.parametrize(
    "broken", [{"status": 500}, {"status": 503}, {"cut": 100}, {"shorten": 7}], ids=lambda rule: next(iter(rule))
)
def test_what_passes_is_asked_for_again(place: Path, s3: S3, tmp_path: Path, broken: dict[str, int]) -> None:
    rule = Rule(_data, **broken)
    s3.log.rules.append(rule)
    assert hash("s3://bucket/base") == hash(place / "base")
    assert rule.times == 0, "it was met"
    s3.log.rules.append(Rule(_data, **broken))
    merge("s3://bucket/base", "s3://bucket/adapter", tmp_path / "there")
    merge(place / "base", place / "adapter", tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"status": 500}, r"the store has a fault of its own \(status 500\)\nTry again later\."),
        (
            {"status": 403},
            r"the store does not let you: InternalError\nIf another account may: Set AWS_ACCESS_KEY_ID .*",
        ),
        ({"status": 400}, r"the store refused \(status 400: InternalError\)"),
        ({"cut": 100}, r"the store did not answer as it should: .*\nTry again later\."),
        ({"shorten": 7}, r"the store sends less than it is asked for: \d+ of \d+ bytes arrived\nTry again later; .*"),
    ],
    ids=["500", "403", "400", "cut", "short"],
)
def test_what_stays_is_said_and_nothing_is_written(
    place: Path, s3: S3, tmp_path: Path, broken: dict[str, int], says: str
) -> None:
    s3.log.rules.append(Rule(_data, 1000, **broken))
    text = _refused(lambda: merge("s3://bucket/base", place / "adapter", tmp_path / "out"), s3)
    assert re.fullmatch(rf"s3://bucket/base/model-00001-of-00002\.safetensors: {says}", text), text
    assert not [*tmp_path.iterdir()]


def test_an_object_that_changes_is_refused(place: Path, s3: S3, tmp_path: Path) -> None:
    shard = place / "base" / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    store = Store(parse("s3://bucket"))
    s3.log.rules.append(Rule(_data, before=lambda: store.put(f"base/{shard.name}", bytes(data), len(data))))
    text = _refused(lambda: merge("s3://bucket/base", place / "adapter", tmp_path / "out"), s3)
    assert text == (
        f"s3://bucket/base/{shard.name}: changed while it was read; nothing was made of it\n"
        "Run it again when nothing else writes it."
    )
    assert not (tmp_path / "out").exists()


def test_a_store_that_ignores_the_mark_of_a_state_is_caught_by_its_answer(
    place: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(parse("s3://bucket"))
    entry = store.head("base/config.json")
    assert entry is not None
    other = client.Entry(entry.key, entry.size, f"W/{entry.e_tag}", entry.modified)  # a weak one is not sent along
    with pytest.raises(StoreError, match=r"^s3://bucket/base/config.json: changed while it was read"):
        store.part(other, 0, 10)
    longer = client.Entry(entry.key, entry.size + 1, entry.e_tag, entry.modified)
    with pytest.raises(StoreError, match=r"changed while it was read"):
        store.part(longer, 0, 10)
    assert bytes(store.part(entry, 2, 10)) == (place / "base" / "config.json").read_bytes()[2:10]


def test_no_bucket_no_credentials_no_answer(place: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _refused(lambda: inspect("s3://other/base"), s3) == (
        "s3://other/base: no such bucket\nCheck its name, its region and the endpoint (AWS_ENDPOINT)."
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = _refused(lambda: inspect("s3://bucket/base"), s3)
    assert text.startswith("s3://bucket/base: the store did not answer as it should: HTTP error: error sending request")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    assert "the endpoint is http://, which is not allowed" in _refused(lambda: inspect("s3://bucket/base"), s3)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/169.254.169.254")
    assert _refused(lambda: inspect("s3://bucket/base"), s3) == (
        "s3://bucket/base: no credentials for it were found\n"
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket."
    )
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert "the store does not let you" in _refused(lambda: inspect("s3://bucket/base"), s3)


def test_a_container_without_an_account_asks_for_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    assert _refused(lambda: inspect("az://container/model"), s3) == (
        "az://container/model: no credentials for it were found\n"
        "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or what else your account needs."
    )


def test_several_ranges_are_on_their_way_at_once(place: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three requests is answered when all three have come: one after the other none would be."""
    monkeypatch.setattr(ranges, "SEGMENT", 1 << 11)
    monkeypatch.setattr(ranges, "TINY", 1 << 10)
    together = Barrier(3, timeout=60)
    rule = Rule(lambda request: _data(request) and request.first > 4_000, 3, before=together.wait)
    s3.log.rules.append(rule)
    assert hash("s3://bucket/base", threads=1) == hash(place / "base")
    assert rule.times == 0
    assert not together.broken


def test_a_header_of_lies_is_refused(place: Path, s3: S3, tmp_path: Path) -> None:
    data = bytearray((place / "base" / "model-00001-of-00002.safetensors").read_bytes())
    data[:8] = (1 << 60).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(data)
    s3.put(tmp_path / "model.safetensors", "lies/model.safetensors")
    with pytest.raises(
        BadFile, match=r"model.safetensors: not a safetensors file, or truncated: found a header of \d+"
    ):
        inspect("s3://bucket/lies")
    assert s3.log.sent < 2 * len(data) + 2_000


def test_names_and_sizes_that_no_folder_can_have(place: Path, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"{}")
    s3.put(tmp_path / "x", "long/" + "a" * 300 + ".json")
    with pytest.raises(
        BadFile, match=r"^s3://bucket/long/a+.json: 2 bytes under this name cannot be a file here: file name"
    ):
        inspect("s3://bucket/long")
    s3.put(tmp_path / "x", "both/a.json")
    s3.put(tmp_path / "x", "both/a.json/b.json")
    with pytest.raises(BadFile, match=r"^s3://bucket/both/a.json\S*: 2 bytes under this name cannot be a file here"):
        inspect("s3://bucket/both")
    filling = skeleton._Filling(Store(parse("s3://bucket/both")), tmp_path, "checkpoint")
    with pytest.raises(
        BadFile, match=r"^s3://bucket/h.onnx: 9223372036854775807 bytes under this name cannot be a file"
    ):
        filling.fill(lambda count: None, "h.onnx", client.Entry("h.onnx", 2**63 - 1, '"a"', ""))


@pytest.mark.slow
def test_workers_read_the_store_themselves(place: Path, s3: S3, tmp_path: Path) -> None:
    from loratools.surgery.merge.parts import call_of
    from loratools.surgery.merge.shared import merge_shared

    pytest.importorskip("distributed")
    call = call_of("s3://bucket/base", ["s3://bucket/adapter"], tmp_path / "there")
    merge_shared(call, 2)
    merge(place / "base", place / "adapter", tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


def test_processes_that_ask_a_store_are_no_copies_of_one_that_did(place: Path, s3: S3) -> None:
    from loratools.cli import _pool

    inspect("s3://bucket/base")
    assert _pool._context().get_start_method() == "spawn"


def test_without_obstore_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingExtra) as caught:
        inspect("s3://bucket/base")
    assert str(caught.value) == (
        "object stores and https:// are read and written by obstore, which is not installed\n"
        "Install it: pip install 'loratools[cloud]'"
    )


def test_an_error_of_our_own_stays_what_it_is(s3: S3) -> None:
    with pytest.raises(LoraToolsError, match="no such object"):
        inspect("s3://bucket/none")
