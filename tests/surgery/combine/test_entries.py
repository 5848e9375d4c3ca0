"""What the headers of several files say, in one: what all say, words and tags together, and whose everything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loratools import dialects
from loratools.adapter.model import Adapter, Step
from loratools.decisions import warnings_to
from loratools.surgery.combine import combine
from loratools.surgery.combine.entries import COMBINED_FROM, joined
from loratools.surgery.compare import compare
from loratools.surgery.convert import convert
from tests.dialects._frame.test_metadata import KEPT, TAGS, entries, kohya

HAT = {
    "modelspec.trigger_phrase": "a hat, mychar woman", "modelspec.thumbnail": "data:x", "ss_output_name": "hat",
    "ss_tag_frequency": json.dumps({"10_mychar": {"smiling": 1}, "3_hat": {"hat": 3}}), "modelspec.title": "hat",
    "modelspec.hash_sha256": "0xother", "ss_learning_rate": "1e-4",
}  # fmt: skip


def together(*each: dict[str, str]) -> dict[str, Any]:
    sources = tuple({"digest": f"d{i}"} for i in range(len(each)))
    adapters = [Adapter({}, settings={"metadata": entries} if entries else {}) for entries in each]
    return joined(adapters, [1.0] * len(each), {}, Step("combine", "test", {}, sources))


def test_two_files_become_one_of_their_dialect_that_says_whose_is_what(tmp_path: Path) -> None:
    a, b = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors", **HAT)
    warnings: list[str] = []
    with warnings_to(warnings.append):
        combine([a, b], tmp_path / "c.safetensors", weights=[0.7, "to_q=0.5"])
    assert [text for text in warnings if "header" in text or "thumbnail" in text] == []
    said, tensors = entries(tmp_path / "c.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    assert sorted(tensors) == sorted(entries(a)[1])
    assert said["modelspec.trigger_phrase"] == "mychar woman, a hat"
    assert json.loads(said["ss_tag_frequency"]) == {"10_mychar": {"mychar": 40, "smiling": 12}, "3_hat": {"hat": 3}}
    assert (said["modelspec.thumbnail"], said["modelspec.title"]) == (KEPT["modelspec.thumbnail"], "hat")
    assert (said["modelspec.merged_from"], said["ss_network_dim"]) == ("mychar, hat", "4")
    assert "ss_output_name" not in said
    assert "0xother" not in said.values()
    first, second = json.loads(said[COMBINED_FROM])
    assert first["entries"] == {name: KEPT[name] for name in KEPT if name in HAT} | {"modelspec.hash_sha256": "0xold"}
    assert second["entries"] == HAT
    assert (first["weight"], second["weight"]) == (0.7, {"default": 1.0, "patterns": {"to_q": 0.5}})
    assert first["digest"].startswith("blake3:")
    combine([tmp_path / "c.safetensors", a], tmp_path / "d")
    (again, _) = json.loads(entries(tmp_path / "d")[0][COMBINED_FROM])
    assert again[COMBINED_FROM] == [first, second]
    assert COMBINED_FROM not in again["entries"]


@pytest.mark.parametrize(("first", "second"), [("kohya", "peft"), ("peft", "kohya"), ("comfy", "diffusers")])
def test_the_first_decides_the_dialect_and_to_overrides_it(tmp_path: Path, first: str, second: str) -> None:
    for name, dialect in (("a", first), ("b", second)):
        convert(kohya(tmp_path / f"{name}.safetensors"), tmp_path / name, to=dialect)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c", check_base="off")
    beside = compare(tmp_path / "a", tmp_path / "b")  # the same change, under the names of two namings in the last case
    assert beside.cosine == pytest.approx(1, abs=1e-6)
    wanted = "loratools" if first == "peft" else first
    assert dialects.open_adapter(tmp_path / "c").dialect == wanted
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "d", to="diffusers", dtype="bf16", check_base="off")
    done = dialects.open_adapter(tmp_path / "d")
    assert done.dialect == "diffusers"
    assert {lazy.dtype for lazy in done.tensors().values()} == {"BF16"}


def test_words_of_any_writing_add_up() -> None:
    said = together({"trigger_words": '["a", "b"]', "tags": "x"}, {"trigger_words": '["b", "c"]', "tags": "y,x"})
    assert json.loads(said["metadata"]["trigger_words"]) == ["a", "b", "c"]
    assert said["metadata"]["tags"] == "x, y"
    assert together({}, {}) == {}
    (_, second) = json.loads(together({"only": "here"}, {})["metadata"][COMBINED_FROM])
    assert second == {"digest": "d1", "weight": 1.0, "entries": {}}


@pytest.mark.parametrize("value", ["{", "[1]", '{"a": {"b": "c"}}', '{"a": 1}'])
def test_tags_that_are_none_stay_with_their_file(value: str) -> None:
    said = together({"ss_tag_frequency": json.dumps(TAGS)}, {"ss_tag_frequency": value})["metadata"]
    assert "ss_tag_frequency" not in said
    assert json.loads(said[COMBINED_FROM])[1]["entries"] == {"ss_tag_frequency": value}
