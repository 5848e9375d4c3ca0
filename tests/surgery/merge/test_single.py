"""A model in one file becomes one file: numbers, header, record, and every way back, held against float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools import dialects
from loratools.errors import BadFile, InvalidOption, LoraToolsError, OutputRefused
from tests.storage.codecs import comfy_models
from tests.surgery.models import Lora, lora, merged, same_bytes, save_adapter, save_base, weights_of

SHAPES = {"model.layers.0.q_proj": (32, 48), "model.layers.1.q_proj": (48, 32)}
SAYS = {
    "modelspec.title": "Dawn", "modelspec.hash_sha256": "0x12", "sshs_model_hash": "ab", "sshs_legacy_hash": "cd",
    "ss_steps": "100", "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.thumbnail": "data:x",
}  # fmt: skip
TRUE = {name: text for name, text in SAYS.items() if "hash" not in name}


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata that the safetensors library reads."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def header_of(path: Path) -> dict[str, Any]:
    """Return the whole header as JSON, in the order of the file."""
    data = path.read_bytes()
    document: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return document


def names(folder: Path) -> set[str]:
    """Return what is in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def expect_same(path: Path, wanted: dict[str, Tensor]) -> None:
    """Compare every bit of a file's tensors."""
    written = load_file(path)
    assert written.keys() == wanted.keys()
    assert all(same_bytes(written[name], wanted[name]) for name in wanted)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Weights in BF16, and a tensor that no adapter touches."""
    return weights_of(SHAPES, torch.bfloat16) | {"model.norm.weight": torch.ones(48)}


@pytest.fixture
def room(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A folder with base.safetensors, whose header is not one that we would write, and two adapters."""
    made = dict(reversed(weights.items()))
    save_file(made, tmp_path / "base.safetensors", SAYS)
    for i, adapter in enumerate(adapters()):
        save_adapter(tmp_path / f"adapter{i}", adapter)
    return tmp_path


def adapters() -> list[Lora]:
    """Two adapters, each of its own numbers."""
    return [lora(SHAPES, seed=1), lora(SHAPES, seed=9)]


def test_a_file_in_is_a_file_out(room: Path, weights: dict[str, Tensor]) -> None:
    report = loratools.merge(room / "base.safetensors", room / "adapter0", room / "out.safetensors", threads=3)
    assert names(room) == {"base.safetensors", "adapter0", "adapter1", "out.safetensors"}
    expect_same(room / "out.safetensors", merged(weights, adapters()[:1]))
    says = metadata_of(room / "out.safetensors")
    record = json.loads(says.pop("loratools.record"))
    assert says == TRUE
    assert [entry["digest"] for entry in record["adapters"]] == [entry["digest"] for entry in report.adapters]
    assert record["base"]["tensors"].keys() == {f"{name}.weight" for name in SHAPES}
    old, new = header_of(room / "base.safetensors"), header_of(room / "out.safetensors")
    assert {**old, "__metadata__": 0} == {**new, "__metadata__": 0}
    assert [*old][1:] == [*new][1:]
    size = int.from_bytes((room / "out.safetensors").read_bytes()[:8], "little")
    assert size % 8 == 0
    again = loratools.verify(room / "out.safetensors", room / "base.safetensors", room / "adapter0")
    assert again.ok
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "same.safetensors", threads=1)
    assert (room / "same.safetensors").read_bytes() == (room / "out.safetensors").read_bytes()


def test_a_record_that_was_stripped_undoes_the_merge(room: Path, weights: dict[str, Tensor]) -> None:
    said = {"modelspec.title": "dog", "modelspec.author": "Jane Doe", "modelspec.tags": "a", "ss_session_id": "77"}
    read = [dialects.open_adapter(room / f"adapter{i}") for i in (0, 1)]
    speaking = [replace(each, settings={**each.settings, "metadata": said}) for each in read]
    out = room / "out.safetensors"
    loratools.merge(room / "base.safetensors", speaking, out, keep_residual=True)
    record = json.loads(metadata_of(out)["loratools.record"])
    assert [entry["header"] for entry in record["adapters"]] == [{"modelspec.title": "dog"}] * 2
    assert b"Jane" not in out.read_bytes()
    record["adapters"][0]["header"] |= said | {"ss_training_comment": "x" * 2000}  # as older versions have it
    tensors = load_file(out)
    save_file(tensors, out, metadata_of(out) | {"loratools.record": json.dumps(record)})
    keys = {change.key.rpartition(".")[2] for change in loratools.edit(out, strip=True).changes}
    assert keys == {"author", "ss_session_id", "ss_training_comment"}
    loratools.unmerge(out, speaking, room / "back.safetensors")
    expect_same(room / "back.safetensors", weights)


def test_a_folder_stays_a_folder(room: Path, weights: dict[str, Tensor]) -> None:
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "out")
    assert names(room / "out") == {"base.safetensors", "loratools.json"}
    expect_same(room / "out" / "base.safetensors", merged(weights, adapters()[:1]))
    assert metadata_of(room / "out" / "base.safetensors") == TRUE


def test_shards_become_one_file(room: Path, weights: dict[str, Tensor]) -> None:
    base = save_base(room / "base", weights, shards=2, model_type="llama")
    report = loratools.merge(base, room / "adapter0", room / "out.safetensors", keep_residual=True)
    assert report.left_behind == ("config.json",)
    expect_same(room / "out.safetensors", merged(weights, adapters()[:1]))
    assert metadata_of(room / "out.safetensors").keys() == {"format", "loratools.record"}
    loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "back")
    for path in base.glob("model*"):
        assert (room / "back" / path.name).read_bytes() == path.read_bytes() or path.suffix == ".json"
    loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "back.safetensors")
    expect_same(room / "back.safetensors", weights)
    report_of_base = loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "b.safetensors", base=base)
    assert report_of_base.proved == "root hash"
    expect_same(room / "b.safetensors", weights)


def test_the_residual_gives_back_the_file(room: Path) -> None:
    out = room / "out.safetensors"
    loratools.merge(room / "base.safetensors", [room / "adapter0", room / "adapter1"], out, keep_residual=True)
    assert names(room) >= {"out.residual", "out.safetensors"}
    both = [room / "adapter1", room / "adapter0"]
    report = loratools.unmerge(out, both, room / "back.safetensors")
    assert (report.method, report.proved) == ("residual", "root hash")
    assert (room / "back.safetensors").read_bytes() == (room / "base.safetensors").read_bytes()
    loratools.unmerge(out, both, room / "back")
    assert (room / "back" / "base.safetensors").read_bytes() == (room / "base.safetensors").read_bytes()
    from_base = loratools.unmerge(out, both, room / "copy.safetensors", base=room / "base.safetensors")
    assert (from_base.method, from_base.proved) == ("base", "root hash")
    assert (room / "copy.safetensors").read_bytes() == (room / "base.safetensors").read_bytes()


def test_a_folder_with_hashes_in_its_header_comes_back_too(room: Path) -> None:
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "out", keep_residual=True, dtype="f32")
    loratools.unmerge(room / "out", room / "adapter0", room / "back")
    assert (room / "back" / "base.safetensors").read_bytes() == (room / "base.safetensors").read_bytes()


@pytest.mark.parametrize("model", ["out.safetensors", "out"])
def test_a_switch_is_the_merge_of_the_other(room: Path, model: str) -> None:
    base, ways = room / "base.safetensors", room / "ways.safetensors"
    loratools.merge(base, room / "adapter0", room / model, keep_residual=True)
    report = loratools.switch(room / model, room / "adapter0", room / "adapter1", ways)
    loratools.merge(base, room / "adapter1", room / "direct.safetensors", keep_residual=True)
    assert report.exact
    assert ways.read_bytes() == (room / "direct.safetensors").read_bytes()
    loratools.unmerge(ways, room / "adapter1", room / "back.safetensors")
    assert (room / "back.safetensors").read_bytes() == base.read_bytes()


def test_without_a_residual_it_is_approximate(room: Path, weights: dict[str, Tensor]) -> None:
    out, second = room / "out.safetensors", room / "second.safetensors"
    loratools.merge(room / "base.safetensors", room / "adapter0", out)
    switched = loratools.switch(out, room / "adapter0", room / "adapter1", second)
    back = loratools.unmerge(second, room / "adapter1", room / "back.safetensors")
    assert (switched.exact, back.method, back.proved) == (False, "approximate", None)
    record = json.loads(metadata_of(room / "back.safetensors")["loratools.record"])
    assert record["adapters"] == []
    assert record["error_bound"] == back.error_bound > 0
    written = load_file(room / "back.safetensors")
    worst = max((written[name].double() - W.double()).abs().max().item() for name, W in weights.items())
    assert 0 < worst <= back.error_bound


def test_an_adapter_is_not_merged_twice(room: Path) -> None:
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "out.safetensors")
    with pytest.raises(OutputRefused, match="apply it twice") as caught:
        loratools.merge(room / "out.safetensors", room / "adapter0", room / "twice.safetensors")
    assert "loratools.record" in str(caught.value.hint)
    loratools.merge(room / "out.safetensors", room / "adapter1", room / "both")  # its record lies beside it then
    assert "loratools.record" not in metadata_of(room / "both" / "out.safetensors")
    assert len(json.loads((room / "both" / "loratools.json").read_text())["adapters"]) == 1


def test_force_takes_the_residual_along(room: Path) -> None:
    out, base = room / "out.safetensors", room / "base.safetensors"
    loratools.merge(base, room / "adapter0", out, keep_residual=True)
    with pytest.raises(OutputRefused, match="exists already"):
        loratools.merge(base, room / "adapter1", out)
    first = (room / "out.residual").read_bytes()
    loratools.merge(base, room / "adapter1", out, keep_residual=True, force=True, durable=True)
    assert (room / "out.residual").read_bytes() != first
    assert loratools.unmerge(out, room / "adapter1", room / "back.safetensors").method == "residual"
    loratools.merge(base, room / "adapter0", out, force=True)
    assert not (room / "out.residual").exists()
    assert not [name for name in names(room) if name.startswith(".")]


def test_a_residual_of_another_file_is_not_overwritten(room: Path) -> None:
    (room / "out.residual").write_text("of somebody else")
    with pytest.raises(OutputRefused, match=r"out.residual exists already"):
        loratools.merge(room / "base.safetensors", room / "adapter0", room / "out.safetensors")
    assert (room / "out.residual").read_text() == "of somebody else"


def test_a_dtype_and_the_other_ending(room: Path, weights: dict[str, Tensor]) -> None:
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "out.sft", dtype="f32", keep_residual=True)
    written, wanted = load_file(room / "out.sft"), merged(weights, adapters()[:1], torch.float32)
    for name, W in wanted.items():
        torch.testing.assert_close(written[name], W, rtol=1e-6, atol=1e-7)
    loratools.unmerge(room / "out.sft", room / "adapter0", room / "back.safetensors")
    assert (room / "back.safetensors").read_bytes() == (room / "base.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("out.safetensors", {"max_shard_size": "1GB"}, "max_shard_size: there is one file"),
        ("out.safetensors", {"resume": True}, "resume: one file"),
        ("out.safetensors", {"quantized": "requantize", "keep_loss": 4}, "keep_loss: the adapter"),
        ("out.ckpt", {}, "files of pickles are not written"),
        ("out.gguf", {}, "made of a GGUF base"),
    ],
)
def test_what_one_file_cannot_be(room: Path, name: str, options: dict[str, Any], match: str) -> None:
    before = names(room)
    with pytest.raises(InvalidOption) as caught:
        loratools.merge(room / "base.safetensors", room / "adapter0", room / name, **options)
    assert match in " ".join([caught.value.message, *caught.value.problems])
    assert caught.value.hint
    assert names(room) == before


def test_a_pickled_base_becomes_a_safetensors_file(room: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, room / "base.ckpt")
    loratools.merge(room / "base.ckpt", room / "adapter0", room / "out.safetensors", keep_residual=True)
    expect_same(room / "out.safetensors", merged(weights, adapters()[:1]))
    loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "back.safetensors")
    expect_same(room / "back.safetensors", weights)


def test_a_damaged_description_of_the_header_is_refused(room: Path) -> None:
    loratools.merge(room / "base.safetensors", room / "adapter0", room / "out.safetensors", keep_residual=True)
    residual = room / "out.residual"
    document = json.loads(metadata_of(residual)["residual"])
    assert document["headers"].keys() == {"base.safetensors"}
    tensors = load_file(residual)
    for packed in ("no base64", "AAAA", 7):
        document["headers"] = {"base.safetensors": packed}
        save_file(tensors, residual, {"residual": json.dumps(document)})
        with pytest.raises(BadFile, match="layout is damaged"):
            loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "back.safetensors")
    document.pop("headers")  # of an older version: the numbers are right all the same
    save_file(tensors, residual, {"residual": json.dumps(document)})
    report = loratools.unmerge(room / "out.safetensors", room / "adapter0", room / "back.safetensors")
    assert report.proved == "root hash"


def test_a_damaged_record_is_said(room: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, room / "odd.safetensors", {"loratools.record": "[]"})
    with pytest.raises(LoraToolsError, match="JSON object"):
        loratools.merge(room / "odd.safetensors", room / "adapter0", room / "out.safetensors")


@pytest.mark.parametrize("how", ["old", "tensors", "header", torch.float8_e4m3fn])
@pytest.mark.parametrize("policy", ["dequantize", "partial", "requantize"])
def test_a_file_of_codes_is_that_of_the_folder(tmp_path: Path, how: Any, policy: Any) -> None:
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    comfy_models.scaled(base, how) if isinstance(how, str) else comfy_models.cast(base, how)
    comfy_models.lora(adapter)
    chosen = {"quantized": policy, "force": True}
    loratools.merge(base, adapter, tmp_path / "out", **chosen)
    loratools.merge(base, adapter, out, keep_residual=True, **chosen)
    expect_same(out, load_file(tmp_path / "out" / "base.safetensors"))
    says = metadata_of(out)
    assert says.pop("loratools.record")
    assert says == metadata_of(tmp_path / "out" / "base.safetensors")
    assert loratools.verify(out, base, adapter).ok
    loratools.unmerge(out, adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    if policy == "dequantize":
        report = loratools.dequantize(base, tmp_path / "plain.safetensors", verify=True)
        loratools.dequantize(base, tmp_path / "plain")
        expect_same(tmp_path / "plain.safetensors", load_file(tmp_path / "plain" / "base.safetensors"))
        assert report.root
