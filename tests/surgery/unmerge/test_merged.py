"""What a record says of an adapter besides its tensors: an edited scaling, layout or orientation is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import IncompatibleAdapter
from loratools.storage.companions import RECORD
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from tests.surgery.models import load, lora, random, save_adapter, save_base

SHAPES = {"h.0.attn.q_proj": (8, 8), "h.0.attn.v_proj": (8, 8)}
EDITS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 2},
    "rslora": {"use_rslora": True},
    "alpha-of-one": {"alpha_pattern": {"v_proj": -8}},
}


def edited(adapter: Path, name: str, **fields: Any) -> Path:
    """Copy an adapter with other fields in its config."""
    copy = Path(shutil.copytree(adapter, adapter.with_name(name)))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return copy


@pytest.fixture
def place(tmp_path: Path) -> Path:
    weights = {f"{name}.weight": random(8, 8, seed=i) for i, name in enumerate(SHAPES)}
    save_base(tmp_path / "base", weights, model_type="llama")
    save_adapter(tmp_path / "adapter", lora(SHAPES))
    save_adapter(tmp_path / "other", lora(SHAPES, seed=5))
    return tmp_path


@pytest.mark.parametrize("way", ["approximate", "residual", "base"])
@pytest.mark.parametrize("edit", sorted(EDITS))
def test_an_edited_scaling_is_refused(edit: str, way: str, place: Path) -> None:
    merge(place / "base", [place / "adapter"], place / "merged", keep_residual=way == "residual")
    wrong = edited(place / "adapter", "wrong", **EDITS[edit])
    base = place / "base" if way == "base" else None
    with pytest.raises(IncompatibleAdapter, match="does not list what is to be taken out") as refusal:
        unmerge(place / "merged", [wrong], place / "out", base=base)
    with pytest.raises(IncompatibleAdapter, match=r"v_proj: merged with scaling 2\.0, this file says"):
        switch(place / "merged", [wrong], [place / "other"], place / "out")
    lines = [line for line in refusal.value.problems if "merged with scaling" in line]
    assert len(lines) == (1 if edit == "alpha-of-one" else 2)
    assert not (place / "out").exists()
    report = unmerge(place / "merged", [place / "adapter"], place / "out", base=base)
    wanted, found = load(place / "base"), load(place / "out")
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= report.error_bound


def test_the_record_names_the_scalings_of_the_few(place: Path) -> None:
    merge(place / "base", [edited(place / "adapter", "mixed", alpha_pattern={"v_proj": 1})], place / "merged")
    (entry,) = json.loads((place / "merged" / RECORD).read_text())["adapters"]
    assert (entry["scaling"], entry["scalings"]) == (0.25, {"h.0.attn.q_proj": 2.0})
    assert (entry["layouts"], entry["transposed"]) == ({}, [])


def test_the_same_tensors_with_two_scalings_are_told_apart(place: Path) -> None:
    wrong = edited(place / "adapter", "wrong", lora_alpha=2)
    merge(place / "base", [place / "adapter", wrong], place / "merged")
    merge(place / "base", [place / "adapter"], place / "one")
    report = unmerge(place / "merged", [wrong], place / "out")
    wanted, found = load(place / "one"), load(place / "out")
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= report.error_bound < 1e-4
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        unmerge(place / "merged", [edited(place / "adapter", "third", lora_alpha=3)], place / "no")


def test_an_older_record_still_leads_back(place: Path) -> None:
    merge(place / "base", [place / "adapter"], place / "merged")
    file = place / "merged" / RECORD
    record = json.loads(file.read_text())
    for field in ("scaling", "scalings", "layouts", "transposed"):
        del record["adapters"][0][field]
    file.write_text(json.dumps(record))
    unmerge(place / "merged", [place / "adapter"], place / "out")
    wanted, found = load(place / "base"), load(place / "out")
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5


def test_an_orientation_that_changed_is_refused(tmp_path: Path) -> None:
    """Square Conv1D: only model_type says how it lies; sealed, the adapter says it itself."""
    name = "h.0.attn.c_proj"
    base = save_base(tmp_path / "base", {f"{name}.weight": random(8, 8)}, model_type="gpt2")
    adapter = save_adapter(tmp_path / "adapter", lora({name: (8, 8)}))
    convert(adapter, tmp_path / "sealed", base=base)
    for source in (adapter, tmp_path / "sealed"):
        merged = tmp_path / f"by-{source.name}"
        merge(base, [source], merged)
        assert json.loads((merged / RECORD).read_text())["adapters"][0]["transposed"] == [name]
        (merged / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    with pytest.raises(IncompatibleAdapter, match="not stored as they were when it was merged") as refusal:
        unmerge(tmp_path / "by-adapter", [adapter], tmp_path / "out")
    assert refusal.value.problems == (f"adapter 1: {name}: (in, out) at the merge",)
    assert not (tmp_path / "out").exists()
    unmerge(tmp_path / "by-sealed", [tmp_path / "sealed"], tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out"), load(base), rtol=0, atol=1e-6)


def test_other_rows_are_refused(tmp_path: Path) -> None:
    """The tensors do not say which tokens they are for; the record does."""
    base = save_base(tmp_path / "base", {"model.embed_tokens.weight": random(9, 4)}, model_type="llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    part = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({part: random(2, 4)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": []}
    rows = {"trainable_token_indices": {"embed_tokens": [5, 2]}}
    (adapter / "adapter_config.json").write_text(json.dumps(config | rows))
    merge(base, [adapter], tmp_path / "merged", keep_residual=True)
    wrong = edited(adapter, "wrong", trainable_token_indices={"embed_tokens": [2, 5]})
    with pytest.raises(IncompatibleAdapter, match=r"merged with the layout \{'rows': \[5, 2\]\}, this file says"):
        unmerge(tmp_path / "merged", [wrong], tmp_path / "out")
    unmerge(tmp_path / "merged", [adapter], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], random(9, 4))
