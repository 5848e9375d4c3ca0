"""`convert --onto`: an adapter in the basis of a folded base, sealed with it; merged, it is the carried merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.decisions import warnings_to
from loratools.errors import IncompatibleAdapter, InvalidOption, WrongBase
from tests.conftest import Result
from tests.make.folded_models import LINEARS, Folded, adapter, awq, llama
from tests.surgery.models import same_bytes

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folded:
    folder = tmp_path_factory.mktemp("folded")
    return awq(folder, llama(folder / "original", hidden=64))


def test_a_carried_adapter_is_that_of_the_carried_merge(made: Folded, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", LINEARS, made.weights)
    done = loratools.convert(tmp_path / "lora", tmp_path / "carried", onto=made.base, original=made.original)
    assert done.base
    assert done.base.sealed
    assert done.base.root == loratools.hash_checkpoint(made.base, "root").root
    tensors = load_file(tmp_path / "carried" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    said: list[str] = []
    with warnings_to(said.append):
        loratools.merge(made.base, tmp_path / "carried", tmp_path / "first")
    assert not [text for text in said if "another basis" in text]
    loratools.merge(made.base, tmp_path / "lora", tmp_path / "second", original=made.original)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(same_bytes(first[name], second[name]) for name in first)
    entries = [
        json.loads((tmp_path / name / "loratools.json").read_text())["adapters"][0] for name in ("first", "second")
    ]
    assert entries[0]["digest"] == entries[1]["digest"] == done.digest
    loratools.merge(made.base, tmp_path / "carried", tmp_path / "again", original=made.original)
    third = load_file(tmp_path / "again" / "model.safetensors")
    assert all(same_bytes(first[name], third[name]) for name in first)  # never carried twice
    report = loratools.verify(tmp_path / "second", made.base, tmp_path / "carried")
    assert report.ok


def test_scales_are_those_of_the_norms(made: Folded, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", ["self_attn.q_proj"], made.weights)
    loratools.convert(tmp_path / "lora", tmp_path / "carried", onto=made.base, original=made.original)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "carried"))
    norm = "model.layers.1.input_layernorm.weight"
    folded = load_file(made.base / "model.safetensors")[norm].double()
    s = made.weights[norm].double() / folded
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    torch.testing.assert_close(after[name].double(), before[name].double() * s, rtol=1e-7, atol=0)
    name = name.replace("lora_A", "lora_B")
    assert same_bytes(after[name], before[name])


def test_an_adapter_of_the_folded_base_is_sealed_as_it_is(made: Folded, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", LINEARS, made.weights)
    options: dict[str, Any] = {"onto": made.base, "trained_on": "folded"}
    done = loratools.convert(tmp_path / "lora", tmp_path / "own", **options)
    assert done.base
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "own"))
    assert all(same_bytes(before[name], after[name]) for name in before)
    said: list[str] = []
    with warnings_to(said.append):
        loratools.merge(made.base, tmp_path / "own", tmp_path / "out", original=made.original)
    assert not [text for text in said if "another basis" in text]
    [entry] = json.loads((tmp_path / "out" / "loratools.json").read_text())["adapters"]
    assert "carried_from" not in entry  # its seal says that it is of the base


def test_what_is_refused(made: Folded, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", LINEARS, made.weights)
    with pytest.raises(IncompatibleAdapter, match="no original is given"):
        loratools.convert(tmp_path / "lora", tmp_path / "no", onto=made.base)
    with pytest.raises(InvalidOption, match="both given"):
        loratools.convert(tmp_path / "lora", tmp_path / "no", onto=made.base, base=made.base)
    with pytest.raises(InvalidOption, match="carried onto a base"):
        loratools.convert(tmp_path / "lora", tmp_path / "no", original=made.original)
    loratools.convert(tmp_path / "lora", tmp_path / "sealed", base=made.original)
    loratools.convert(tmp_path / "sealed", tmp_path / "carried", onto=made.base, original=made.original)
    other = {name: tensor * 1.25 if "proj" in name else tensor for name, tensor in made.weights.items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text((made.original / "config.json").read_text())
    with pytest.raises(WrongBase, match="not the original that the adapter is sealed with"):
        loratools.convert(tmp_path / "sealed", tmp_path / "no", onto=made.base, original=tmp_path / "other")


def test_on_the_command_line(made: Folded, tmp_path: Path, shell: Callable[..., Result]) -> None:
    adapter(tmp_path / "lora", LINEARS, made.weights)
    onto = f"loratools convert lora --onto {made.base} -o carried"
    refused = shell(onto, tmp_path)
    assert refused.code == 1
    assert "--original" in refused.err
    assert shell(f"{onto} --original {made.original}", tmp_path).code == 0
    merged = shell(f"loratools merge {made.base} lora -o out --original {made.original} --verify", tmp_path)
    assert merged.code == 0, merged.err
    assert "is carried from" in merged.err
