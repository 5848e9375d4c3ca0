"""Models and adapters in a real S3 server: the same answers as of files here, and few bytes for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools import Checkpoint, convert, extract_svd, hash, inspect, merge, open_adapter, validate, verify
from loratools.errors import BadFile
from loratools.storage import resolvers, sources
from loratools.storage.stores import ranges, skeleton
from tests.make import fp8, tiny
from tests.storage.stores.server import S3

pytestmark = pytest.mark.interop


@pytest.fixture
def place(prepared: Path, s3: S3) -> Path:
    """The prepared folder, of which the bucket has a copy."""
    for name in ("base", "adapter", "sealed", "tuned", "quantized", "merged"):
        s3.put(prepared / name, f"models/{name}")
    return prepared


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_inspect_moves_headers_and_configs_alone(s3: S3, tmp_path: Path) -> None:
    weights = tiny.llama_weights(layers=40)
    folder = tiny.save_llama(tmp_path / "model", weights)
    (folder / "tokenizer.json").write_text(json.dumps({"model": "x" * 100_000}))
    s3.put(folder, "model")
    size = sum(path.stat().st_size for path in folder.iterdir())
    summary = inspect("s3://bucket/model")
    assert summary.total == inspect(folder).total
    assert size > 2_500_000
    assert s3.log.sent < 2 * skeleton.FIRST + 120_000, "two headers, the index and config.json"
    assert len(s3.log.requests) == 5, "the list, two headers, two JSON files"


def test_what_is_there_is_what_is_here(place: Path, s3: S3, tmp_path: Path) -> None:
    s3.put(place / "base" / "config.json", "alone/config.json")
    assert hash("s3://bucket/models/base") == hash(place / "base")
    assert hash("s3://bucket/models/sealed") == hash(place / "sealed")
    assert validate("s3://bucket/models/sealed", "s3://bucket/models/base").valid
    with pytest.raises(BadFile, match=r"^s3://bucket/alone: no model weights"), sources.session():
        Checkpoint.open("s3://bucket/alone")


@pytest.mark.parametrize("base", ["base", "quantized"])
def test_a_merge_has_the_same_bytes(place: Path, s3: S3, tmp_path: Path, base: str) -> None:
    merge(place / base, place / "adapter", tmp_path / "here")
    with sources.session():
        merge(f"s3://bucket/models/{base}", "s3://bucket/models/adapter", tmp_path / "there")
        assert verify(tmp_path / "there", f"s3://bucket/models/{base}", "s3://bucket/models/adapter").ok
    assert _bytes(tmp_path / "there") == _bytes(tmp_path / "here")
    assert not resolvers.FAR


def test_a_merge_with_a_residual_and_its_undoing(place: Path, s3: S3, tmp_path: Path) -> None:
    from loratools import unmerge

    merge("s3://bucket/models/base", place / "adapter", tmp_path / "merged", keep_residual=True)
    s3.put(tmp_path / "merged", "merged")
    unmerge("s3://bucket/merged", place / "adapter", tmp_path / "again")
    assert hash(tmp_path / "again").root == hash(place / "base").root


def test_an_extraction_is_the_same(place: Path, s3: S3, tmp_path: Path) -> None:
    extract_svd(place / "base", place / "tuned", tmp_path / "here", 4)
    extract_svd("s3://bucket/models/base", "s3://bucket/models/tuned", tmp_path / "there", 4)
    assert _bytes(tmp_path / "there") == _bytes(tmp_path / "here")


def test_a_merge_moves_what_it_needs_once(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so little memory that nothing that is read twice would still be there."""
    monkeypatch.setattr(ranges, "SEGMENT", 1 << 13)
    monkeypatch.setattr(ranges, "TINY", 1 << 10)
    monkeypatch.setattr(ranges, "HELD", 24)
    monkeypatch.setattr(skeleton, "FIRST", 1 << 10)
    base = tiny.save_llama(tmp_path / "base", tiny.llama_weights(layers=40))
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors(tiny.SHAPES, layers=40))
    s3.put(base, "base")
    s3.put(tmp_path / "adapter", "adapter")
    merge("s3://bucket/base", "s3://bucket/adapter", tmp_path / "there", threads=2)
    needed = sum(path.stat().st_size for folder in (base, tmp_path / "adapter") for path in folder.iterdir())
    assert needed > 4 * 24 * (1 << 13)
    assert needed <= s3.log.sent <= 1.05 * needed
    merge(base, tmp_path / "adapter", tmp_path / "here")
    assert _bytes(tmp_path / "there") == _bytes(tmp_path / "here")


def test_one_file_and_an_index_are_places_too(place: Path, s3: S3, tmp_path: Path) -> None:
    single = tiny.save_llama(tmp_path / "single", tiny.llama_weights(), shards=1)
    s3.put(single, "single")
    summary = inspect("s3://bucket/single/model.safetensors")
    assert summary.architecture == inspect(single / "model.safetensors").architecture == "LlamaForCausalLM"
    assert hash("s3://bucket/models/base/model.safetensors.index.json") == hash(place / "base")
    hint = "\\nGive the folder instead: s3://bucket/models/base$"
    with pytest.raises(BadFile, match=rf"0002.safetensors: this is one shard of several{hint}"), sources.session():
        merge("s3://bucket/models/base/model-00001-of-00002.safetensors", place / "adapter", tmp_path / "out")
    convert("s3://bucket/models/adapter/adapter_model.safetensors", tmp_path / "ours", base="s3://bucket/models/base")
    assert open_adapter(tmp_path / "ours").base


def test_files_that_are_no_safetensors(s3: S3, tmp_path: Path, place: Path) -> None:
    import torch

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(place / "base" / "config.json", folder)
    torch.save(tiny.llama_weights(), folder / "pytorch_model.bin")
    s3.put(folder, "pickled")
    assert hash("s3://bucket/pickled") == hash(folder)
    merge("s3://bucket/pickled", place / "adapter", tmp_path / "there")
    merge(folder, place / "adapter", tmp_path / "here")
    assert _bytes(tmp_path / "there") == _bytes(tmp_path / "here")


def test_gguf_comes_whole(s3: S3, tmp_path: Path, workplace: Path) -> None:
    pytest.importorskip("gguf")
    from tests.make import gguf_models

    gguf_models.save_llama(tmp_path / "model.gguf", tiny.llama_weights())
    s3.put(tmp_path / "model.gguf", "g/model.gguf")
    assert hash("s3://bucket/g/model.gguf") == hash(tmp_path / "model.gguf")
    assert inspect("s3://bucket/g/model.gguf").tensors == inspect(tmp_path / "model.gguf").tensors


def test_records_name_the_model_and_no_place(place: Path, s3: S3, tmp_path: Path) -> None:
    merge("s3://bucket/models/base", "s3://bucket/models/adapter", tmp_path / "there")
    record = (tmp_path / "there" / "loratools.json").read_text()
    with sources.session():
        assert sources.origin(sources.local("s3://bucket/models/base", "header")) == ("base", None)
    assert "s3://" not in record
    assert "bucket" not in record
    assert "loratools-headers" not in record


def test_the_shell_names_places_as_they_were_given(
    place: Path, s3: S3, shell: Callable[..., object], tmp_path: Path
) -> None:
    done = shell("loratools merge s3://bucket/models/base s3://bucket/models/adapter -o out -v", tmp_path, **s3.env)
    assert done.code == 0, done.err
    assert "loratools-headers" not in done.out + done.err
    assert s3.env["AWS_SECRET_ACCESS_KEY"] not in done.out + done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_there_is_a_sentence(place: Path, s3: S3) -> None:
    with pytest.raises(BadFile, match=r"^s3://bucket/none: no such object, and none under it\nCheck the key"):
        inspect("s3://bucket/none")
    with pytest.raises(BadFile, match=r"^s3://bucket/models/base/none.safetensors: no such object"):
        inspect("s3://bucket/models/base/none.safetensors")


def test_names_of_strangers_stay_in_their_folder(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    s3.put(tmp_path / "x", "evil/a%5C..%5C..%5Cb.json")
    with pytest.raises(BadFile, match=r"^s3://bucket/evil: an object with a name that no file can have"):
        inspect("s3://bucket/evil")


def test_too_many_objects_are_refused(place: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage.stores import client

    monkeypatch.setattr(client, "MOST", 10)
    with pytest.raises(BadFile, match=r"^s3://bucket/models: more than 10 objects under it\nGive the folder of one"):
        inspect("s3://bucket/models")


def test_quantized_codes_are_decoded_from_ranges(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "FIRST", 1 << 10)
    fp8.save_llama(tmp_path / "quantized", tiny.llama_weights())
    s3.put(tmp_path / "quantized", "quantized")
    assert hash("s3://bucket/quantized") == hash(tmp_path / "quantized")
