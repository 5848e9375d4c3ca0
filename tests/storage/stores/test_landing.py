"""Outputs in a real S3 server: nothing is one before its last file, and a cut upload goes on from what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools import (
    combine,
    convert,
    dequantize,
    edit,
    extract_svd,
    find,
    hash,
    inspect,
    merge,
    push,
    report,
    resize,
    unmerge,
    verify,
)
from loratools.errors import BadFile, IncompatibleAdapter, InvalidOption, OutputRefused, StoreError, WrongBase
from loratools.storage import resolvers
from loratools.storage.stores import client, ranges, skeleton
from tests.make import tiny
from tests.storage.stores.server import S3, Request, Rule

pytestmark = pytest.mark.interop


@pytest.fixture
def place(prepared: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder, of which the bucket has a copy of the base and the adapter."""
    monkeypatch.setitem(client._RETRIES, "max_retries", 1)
    for name in ("base", "adapter"):
        s3.put(prepared / name, f"in/{name}")
    return prepared


def _same(s3: S3, key: str, folder: Path) -> None:
    """The bucket has the files of a folder under a key, and no other."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in s3.objects() if name.startswith(f"{key}/")} == {f"{key}/{name}" for name in files}
    for name, data in files.items():
        assert s3.objects()[f"{key}/{name}"] == data, name


def _puts(s3: S3, key: str) -> list[str]:
    """Return what was stored under a key, in order, the list of an upload left out."""
    names = [request.path.removeprefix(f"/bucket/{key}/") for request in s3.log.of("PUT", f"/bucket/{key}/")]
    return [name for name in names if name != skeleton.UNFINISHED]


def test_a_merge_from_a_store_to_a_store(place: Path, s3: S3, tmp_path: Path) -> None:
    merge(place / "base", place / "adapter", tmp_path / "here")
    report = merge("s3://bucket/in/base", "s3://bucket/in/adapter", "s3://bucket/out/model")
    assert report.output == "s3://bucket/out/model"
    _same(s3, "out/model", tmp_path / "here")
    sent = _puts(s3, "out/model")
    assert sent[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sent[-3:] == ["config.json", "model.safetensors.index.json", "loratools.json"]
    assert verify("s3://bucket/out/model", place / "base", place / "adapter").ok
    assert not resolvers.FAR
    with pytest.raises(
        OutputRefused, match=r"^s3://bucket/out/model exists already\nChoose another output, or replace"
    ):
        merge(place / "base", place / "adapter", "s3://bucket/out/model")


def test_every_verb_that_writes(place: Path, s3: S3, tmp_path: Path) -> None:
    convert(place / "adapter", tmp_path / "sealed", base=place / "base")
    made = convert("s3://bucket/in/adapter", "s3://bucket/o/sealed", base="s3://bucket/in/base")
    assert made.output == "s3://bucket/o/sealed"
    _same(s3, "o/sealed", tmp_path / "sealed")
    extract_svd(place / "base", place / "tuned", tmp_path / "extracted", 4)
    extract_svd("s3://bucket/in/base", place / "tuned", "s3://bucket/o/extracted", 4)
    _same(s3, "o/extracted", tmp_path / "extracted")
    combine([place / "adapter", place / "other"], tmp_path / "blend")
    combine(["s3://bucket/in/adapter", place / "other"], "s3://bucket/o/blend")
    _same(s3, "o/blend", tmp_path / "blend")
    resize(place / "adapter", tmp_path / "small", 2)
    resize("s3://bucket/in/adapter", "s3://bucket/o/small", 2)
    _same(s3, "o/small", tmp_path / "small")
    dequantize(place / "quantized", tmp_path / "plain", verify=True)
    assert dequantize(place / "quantized", "s3://bucket/o/plain", verify=True).verified
    _same(s3, "o/plain", tmp_path / "plain")
    edit(place / "sealed", tmp_path / "edited", tags=["a"])
    edit(place / "sealed", "s3://bucket/o/edited", tags=["a"])
    _same(s3, "o/edited", tmp_path / "edited")


def test_one_file_and_its_residual(place: Path, s3: S3, tmp_path: Path) -> None:
    merge(place / "base", place / "adapter", tmp_path / "m.safetensors", keep_residual=True)
    merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/m.safetensors", keep_residual=True)
    for name in ("m.safetensors", "m.residual"):
        assert s3.objects()[f"o/{name}"] == (tmp_path / name).read_bytes()
    merge(place / "base", place / "adapter", "s3://bucket/o/m.safetensors", force=True)
    assert "o/m.residual" not in s3.objects()


def test_a_residual_of_what_was_sent_already(place: Path, s3: S3, tmp_path: Path) -> None:
    merge(place / "base", place / "adapter", tmp_path / "here", keep_residual=True)
    merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model", keep_residual=True)
    _same(s3, "o/model", tmp_path / "here")
    unmerge("s3://bucket/o/model", place / "adapter", "s3://bucket/o/again")
    assert hash("s3://bucket/o/again").root == hash(place / "base").root


def test_large_files_go_in_parts(s3: S3, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = tiny.llama_weights() | {"more": torch.arange(6_000_000, dtype=torch.float32)}
    base = tiny.save_llama(tmp_path / "base", tiny.llama_weights(), shards=1)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors())
    merge(base, tmp_path / "adapter", "s3://bucket/o/model")
    merge(base, tmp_path / "adapter", tmp_path / "here")
    _same(s3, "o/model", tmp_path / "here")
    parts = [request for request in s3.log.of("PUT", "model.safetensors") if "partNumber" in request.query]
    assert len(parts) == -(-(base / "model.safetensors").stat().st_size // client.PART) == 3
    assert s3.uploads() == 0


def test_a_fault_while_it_is_sent_passes(place: Path, s3: S3, tmp_path: Path) -> None:
    def meets(method: str, part: str) -> Callable[[Request], bool]:
        return lambda request: request.method == method and part in request.path

    faults = [
        Rule(meets(method, part), status=status)
        for method, part, status in (
            ("PUT", "model-00001", 500),
            ("PUT", "model-00002", 503),
            ("PUT", skeleton.UNFINISHED, 500),
            ("HEAD", "loratools.json", 503),
            ("GET", "model-00002", 500),
        )
    ]
    s3.log.rules += faults
    merge("s3://bucket/in/base", "s3://bucket/in/adapter", "s3://bucket/o/model")
    assert [rule.times for rule in faults] == [0] * len(faults)
    merge(place / "base", place / "adapter", tmp_path / "here")
    _same(s3, "o/model", tmp_path / "here")


def test_a_cut_upload_is_no_model_and_goes_on(
    place: Path, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(place / "base", place / "adapter", tmp_path / "here")
    second = Rule(lambda request: request.method == "PUT" and "/o/model/model-00002" in request.path, 1000, 500)
    s3.log.rules.append(second)
    with pytest.raises(
        StoreError, match=r"^s3://bucket/o/model/model-00002-of-00002.safetensors: the store has a fault"
    ):
        merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model")
    assert "s3://bucket/o/model is not finished: 1 file there, and the same command goes on from them" in caplog.text
    assert sorted(s3.objects("o/")) == ["o/model/.loratools-upload.json", "o/model/model-00001-of-00002.safetensors"]
    with pytest.raises(
        BadFile, match=r"^s3://bucket/o/model: an output that is not finished: its upload was cut short"
    ):
        inspect("s3://bucket/o/model")
    s3.log.clear()
    report = merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model")
    assert report.reused == ("model-00001-of-00002.safetensors",)
    assert "model-00001-of-00002.safetensors" not in _puts(s3, "o/model")
    data = [request for request in s3.log.of("GET", "in/base/model-00001") if request.range != "bytes=0-65535"]
    assert sum(request.sent for request in data) == 0, "what its tensors are made of is not read again"
    _same(s3, "o/model", tmp_path / "here")


def test_what_is_no_longer_what_was_sent_is_sent_again(place: Path, s3: S3, tmp_path: Path) -> None:
    merge(place / "base", place / "adapter", tmp_path / "here")
    s3.log.rules.append(Rule(lambda request: request.path.endswith("/o/model/loratools.json"), 1000, 500))
    with pytest.raises(StoreError, match=r"loratools.json: the store has a fault"):
        merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model")
    store = client.Store(client.Address("s3", "bucket", "s3://bucket", ""))
    shard = bytearray(s3.objects()["o/model/model-00001-of-00002.safetensors"])
    shard[-1] ^= 1
    store.put("o/model/model-00001-of-00002.safetensors", bytes(shard), len(shard))
    s3.log.clear()
    report = merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model")
    assert report.reused == ("model-00002-of-00002.safetensors",)
    assert set(_puts(s3, "o/model")) == {"model-00001-of-00002.safetensors", "loratools.json"}
    _same(s3, "o/model", tmp_path / "here")


def test_another_merge_does_not_go_on_from_it(place: Path, s3: S3, tmp_path: Path) -> None:
    s3.log.rules.append(Rule(lambda request: request.path.endswith("/o/model/loratools.json"), 1000, 500))
    with pytest.raises(StoreError):
        merge("s3://bucket/in/base", place / "adapter", "s3://bucket/o/model")
    s3.log.clear()
    assert merge("s3://bucket/in/base", place / "other", "s3://bucket/o/model").reused == ()
    merge(place / "base", place / "other", tmp_path / "here")
    _same(s3, "o/model", tmp_path / "here")


def test_an_error_that_would_come_again_leaves_nothing(place: Path, s3: S3, tmp_path: Path) -> None:
    convert(place / "adapter", tmp_path / "sealed", base=place / "tuned")
    with pytest.raises(WrongBase):
        merge("s3://bucket/in/base", tmp_path / "sealed", "s3://bucket/o/model")
    assert s3.objects("o/") == {}
    s3.put(place / "tuned", "in/tuned")
    with pytest.raises(IncompatibleAdapter):
        extract_svd("s3://bucket/in/tuned", "s3://bucket/in/tuned", "s3://bucket/o/none", 4)
    assert s3.objects("o/") == {}


def test_force_replaces_and_leaves_nothing_of_the_old(place: Path, s3: S3, tmp_path: Path) -> None:
    merge(place / "base", place / "adapter", "s3://bucket/o/model", max_shard_size="20kB")
    assert len(s3.objects("o/")) > 8
    seen: list[set[str]] = []

    def look(request: Request) -> bool:
        if request.method == "PUT" and request.path.endswith("model-00001-of-00002.safetensors"):
            seen.append({name.rpartition("/")[2] for name in s3.objects("o/")})
        return False

    s3.log.rules.append(Rule(look))
    merge(place / "base", place / "adapter", "s3://bucket/o/model", force=True)
    merge(place / "base", place / "adapter", tmp_path / "here")
    _same(s3, "o/model", tmp_path / "here")
    assert skeleton.UNFINISHED in seen[0]
    assert not {"config.json", "model.safetensors.index.json", "loratools.json"} & seen[0]


def test_places_that_no_output_can_have(place: Path, s3: S3, tmp_path: Path) -> None:
    for output, says in {
        "s3://bucket": r"^s3://bucket: an output goes to a key of a store, such as s3://bucket/key$",
        "https://host/model": r"^https://host/model: an output goes to a key of a store.*\nA server of web pages is",
    }.items():
        with pytest.raises(InvalidOption, match=says):
            merge(place / "base", place / "adapter", output)
    for output in ("s3://bucket/in/base", "s3://bucket/in/base/inside", "s3://bucket/in"):
        with pytest.raises(OutputRefused, match=r"exists already|is, holds or lies in the input s3://bucket/in/base"):
            merge("s3://bucket/in/base", place / "adapter", output)
    with pytest.raises(OutputRefused, match=r"is, holds or lies in the input s3://bucket/in/base\n"):
        merge("s3://bucket/in/base", place / "adapter", "s3://bucket/in/base", force=True)
    with pytest.raises(StoreError, match=r"^s3://other/x: no such bucket"):
        merge(place / "base", place / "adapter", "s3://other/x")


def test_what_needs_a_folder_here_says_so(place: Path, s3: S3, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"^s3://bucket/in: a reference is no folder\n"):
        find("s3://bucket/in")
    with pytest.raises(BadFile, match=r"^s3://bucket/in/adapter: this needs a file or a folder here\nCopy it from the"):
        push("s3://bucket/in/adapter", "lab/adapter")
    with pytest.raises(InvalidOption, match=r"^s3://bucket/in/adapter lies in a store\nWrite the edited one elsewhere"):
        edit("s3://bucket/in/adapter", tags=["a"])
    page = report(place / "adapter", "s3://bucket/o/page.html")
    assert page.output == "s3://bucket/o/page.html"
    assert len(s3.objects()["o/page.html"]) == page.nbytes


def test_a_large_adapter_is_read_by_ranges(
    place: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "WHOLE", 1_000)
    monkeypatch.setattr(skeleton, "FIRST", 1_000)
    merge("s3://bucket/in/base", "s3://bucket/in/adapter", tmp_path / "there")
    merge(place / "base", place / "adapter", tmp_path / "here")
    assert hash(tmp_path / "there") == hash(tmp_path / "here")


def test_the_disk_holds_one_shard(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the temporary folder watched at every upload."""
    monkeypatch.setattr(ranges, "SEGMENT", 1 << 14)
    base = tiny.save_llama(tmp_path / "base", tiny.llama_weights(layers=40), shards=8)
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors(layers=40))
    import tempfile

    used: list[int] = []

    def look(request: Request) -> bool:
        if request.method == "PUT" and request.path.startswith("/bucket/o/model/model-"):
            files = Path(tempfile.gettempdir()).glob("loratools-merge-*/**/*.safetensors")
            used.append(sum(file.stat().st_blocks * 512 for file in files))
        return False

    s3.log.rules.append(Rule(look))
    merge(base, tmp_path / "adapter", "s3://bucket/o/model")
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(used) == 8
    assert max(used) < 1.2 * max(sizes) < sum(sizes) / 4


KILLED = """
import os, sys
from loratools import merge
from loratools.storage.stores.client import Store
put = Store.put
def killing(self, key, content, size):
    done = put(self, key, content, size)
    if key.endswith(sys.argv[1]):
        os._exit(9)
    return done
Store.put = killing
merge("s3://bucket/in/base", "s3://bucket/in/adapter", "s3://bucket/o/model")
"""


@pytest.mark.parametrize(
    ("moment", "again"),
    [
        ("model-00001-of-00002.safetensors", 6),  # it is there, but was not taken down
        ("config.json", 3),
        ("loratools.json", 1),
    ],
)
def test_a_killed_run_goes_on(place: Path, s3: S3, tmp_path: Path, moment: str, again: int) -> None:
    merge(place / "base", place / "adapter", tmp_path / "here")
    done = subprocess.run([sys.executable, "-c", KILLED, moment], env=os.environ | s3.env, check=False)
    assert done.returncode == 9
    with pytest.raises(BadFile, match="an output that is not finished"):
        inspect("s3://bucket/o/model")
    s3.log.clear()
    merge("s3://bucket/in/base", "s3://bucket/in/adapter", "s3://bucket/o/model")
    _same(s3, "o/model", tmp_path / "here")
    assert len(_puts(s3, "o/model")) == again
    assert _puts(s3, "o/model")[0] == moment


def test_the_shell(place: Path, s3: S3, shell: Callable[..., object], tmp_path: Path) -> None:
    command = "loratools merge s3://bucket/in/base s3://bucket/in/adapter -o s3://bucket/o/model --verify --json"
    done = shell(command, tmp_path, **s3.env)
    assert done.code == 0, done.err + done.out
    document = json.loads(done.out)
    assert document["output"] == "s3://bucket/o/model"
    assert document["verification"]["ok"]
    assert "loratools-" not in done.out.replace("loratools-upload", "")
    shared = "loratools merge s3://bucket/in/base s3://bucket/in/adapter -o s3://bucket/o/x --part 1/2"
    refused = shell(shared, tmp_path, **s3.env)
    assert refused.code == 2
    assert "s3://bucket/o/x: work that is shared out needs a folder here" in refused.err
    assert [*tmp_path.iterdir()] == []
