"""Names and places from strangers: nothing outside the named folders is read, written or replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.errors import (
    BadFile,
    LoraToolsError,
    OutputRefused,
)
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from tests.conftest import Result
from tests.faults.expect import refused
from tests.faults.killer import hashes
from tests.make import tiny


@pytest.mark.parametrize("name", ["../outside.safetensors", "{folder}/outside.safetensors", "..", "sub/x.safetensors"])
def test_an_index_cannot_name_files_elsewhere(model: Path, name: str) -> None:
    save_file({"secret": torch.ones(4)}, model / "outside.safetensors")
    path = model / "base" / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"]["secret"] = name.format(folder=model)
    path.write_text(json.dumps(document))
    error = refused(BadFile, "index and shards do not agree", model)
    assert "must be a plain file name" in error.problems[0]


def test_links_are_not_written_through(model: Path) -> None:
    (model / "elsewhere").mkdir()
    (model / "elsewhere" / "precious").write_text("precious")
    (model / "out").symlink_to("elsewhere")
    for force in (False, True):
        with pytest.raises(OutputRefused, match=r"exists already|symbolic link"):
            merge(model / "base", [model / "adapter"], model / "out", force=force)
    assert hashes(model / "elsewhere").keys() == {"precious"}
    assert (model / "out").is_symlink()


def test_an_output_that_is_an_input_lies_in_one_or_holds_one(model: Path) -> None:
    (model / "holder").mkdir()
    (model / "base").rename(model / "holder" / "base")
    base, before = model / "holder" / "base", hashes(model)
    for output in (
        base,
        base / "out",
        model / "holder",
        model / "adapter",
        model / "adapter" / "x",
        base / ".." / "base",
    ):
        with pytest.raises(OutputRefused, match=r"is, holds or lies in the input|exists already"):
            merge(base, [model / "adapter"], output, force=True)
    for output in (model / "adapter" / "adapter_model.safetensors", base / "config.json"):
        with pytest.raises(LoraToolsError):
            merge(base, [model / "adapter"], output, force=True)
    assert hashes(model) == before


def test_an_opened_adapter_is_an_input_too(model: Path) -> None:
    before = hashes(model)
    adapter = dialects.open_adapter(model / "adapter")
    with pytest.raises(OutputRefused, match="is, holds or lies in the input"):
        merge(Checkpoint.open(model / "base"), [adapter], model / "adapter", force=True)
    assert hashes(model) == before


def test_a_base_of_links_to_elsewhere_is_refused(model: Path) -> None:
    """A link is followed inside its own folder only, so an output cannot be where a base's files really lie."""
    (model / "links").mkdir()
    for path in (model / "base").iterdir():
        (model / "links" / path.name).symlink_to(path)
    before = hashes(model / "base")
    for output in (model / "base", model / "out"):
        with pytest.raises(BadFile, match=r"leads? out of it"):
            merge(model / "links", [model / "adapter"], output, force=True)
    assert hashes(model / "base") == before


EVIL = "model.layers.0.\x1b[2J\x07\u202eevil\x7f.q_proj"


def test_names_with_control_characters_reach_no_terminal(model: Path, shell: Callable[..., Result]) -> None:
    A, B = next(iter(tiny.lora_factors().values()))
    state = {f"base_model.model.{EVIL}.lora_A.weight": A, f"base_model.model.{EVIL}.lora_B.weight": B}
    save_file(state, model / "adapter" / "adapter_model.safetensors")
    save_file({EVIL: torch.ones(2, 2)}, model / "evil.safetensors")
    for line in (
        "merge base adapter -o out",
        "inspect adapter --modules",
        "inspect evil.safetensors",
        "hash evil.safetensors",
    ):
        for extra in ("", " --json"):
            result = shell(f"loratools {line}{extra}", model)
            assert result.code in (0, 1), result
            assert "Traceback" not in result.err
            assert not any(ord(character) < 32 and character not in "\n\t" for character in result.out + result.err)
            assert not any(character in result.out + result.err for character in "\x7f\u202e\x9b")


def test_odd_names_are_names_all_the_same(model: Path) -> None:
    weights = tiny.llama_weights()
    weights["ключ \n\"'\\ \U0001f600"] = torch.arange(7.0)
    weights[""] = torch.ones(1)
    for path in (model / "base").iterdir():
        path.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    merge(model / "base", [model / "adapter"], model / "out")
    merged, expected = (
        load_file(model / "out" / "model.safetensors"),
        tiny.merged_weights(weights, tiny.lora_factors(), 2.0),
    )
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
