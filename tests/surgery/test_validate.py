"""A sealed adapter is valid, and knows its base from every other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter.model import BaseIdentity
from loratools.dialects import open_adapter
from loratools.errors import InvalidFormat
from loratools.format.canonical import canonical
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.base import differences
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.resize import resize
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.validate import validate
from loratools.surgery.verify import verify


def change(folder: Path, name: str, weight: torch.Tensor | None) -> None:
    """Replace a tensor of a sharded model, or take it away (with the index then naming the rest)."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            del weights[name]
            save_file(weights | ({} if weight is None else {name: weight}), file, {"format": "pt"})
    if weight is None:
        (folder / "model.safetensors.index.json").unlink()


def test_sealed_adapter_is_valid_and_fits_its_base(prepared: Path) -> None:
    found = validate(prepared / "sealed", Checkpoint.open(prepared / "base"))
    assert found.valid
    assert (found.report.problems, found.differences) == ((), ())
    assert found.report.modules == 4


def test_another_dialect_is_not_valid(prepared: Path) -> None:
    found = validate(prepared / "adapter", Checkpoint.open(prepared / "base"))
    assert [problem.clause for problem in found.report.problems] == ["L-03"]
    assert found.differences is None
    assert not found.valid


def halved(document: dict[str, Any]) -> None:
    for entry in document["modules"].values():
        entry["scaling"] /= 2


CONFIG = {"lora_alpha": 1.0, "use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 3}}
EDITS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], object] | None, str]] = {
    **{field: ({field: value}, None, "L-06" if field == "rank_pattern" else "L-07") for field, value in CONFIG.items()},
    "scaling": ({}, halved, "I-12"),
    "scaling and the alpha that goes with it": ({"lora_alpha": None}, halved, "I-12"),
    "alpha": ({}, lambda document: document["modules"].update({Q: document["modules"][Q] | {"alpha": 5}}), "I-12"),
    "target": ({}, lambda document: document["modules"][Q].update(tensor="model.norm.weight"), "I-12"),
    "kind": ({}, lambda document: document["modules"][Q].update(kind="dora"), "I-12"),
    "orientation": ({}, lambda document: document["modules"][Q].update(layout={"transposed": True}), "I-12"),
    "meaning": ({}, lambda document: document.pop("meaning"), "I-11"),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("edit", sorted(EDITS))
def test_an_edited_meaning_is_refused_by_every_verb(edit: str, workplace: Path, tmp_path: Path) -> None:
    """Whoever edits a sealed adapter by hand, in the config or in the manifest, is told; nothing is written."""
    base, sealed = workplace / "base", workplace / "sealed"
    merge(base, [sealed], tmp_path / "merged")
    config, change_manifest, clause = EDITS[edit]
    file, side = sealed / "adapter_model.safetensors", sealed / "adapter_config.json"
    stated = json.loads(side.read_text())
    config = config | ({"lora_alpha": stated["lora_alpha"] / 2} if "goes" in edit else {})
    side.write_text(json.dumps(stated | config))
    if change_manifest:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        document = json.loads(header["__metadata__"]["loratools"])
        change_manifest(document)
        header["__metadata__"]["loratools"] = canonical(document)
        encoded = json.dumps(header, ensure_ascii=False).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    assert clause in {problem.clause for problem in validate(sealed).report.problems}
    verbs: list[Callable[[], object]] = [
        lambda: open_adapter(sealed),
        lambda: merge(base, [sealed], tmp_path / "out"),
        lambda: unmerge(tmp_path / "merged", [sealed], tmp_path / "out"),
        lambda: unmerge(tmp_path / "merged", [sealed], tmp_path / "out", base=base),
        lambda: switch(tmp_path / "merged", [sealed], [workplace / "adapter"], tmp_path / "out"),
        lambda: verify(tmp_path / "merged", base, [sealed]),
        lambda: convert(sealed, tmp_path / "out", to="peft", allow_loss=True),
        lambda: combine([sealed, sealed], tmp_path / "out"),
        lambda: resize(sealed, tmp_path / "out", ranks=1),
    ]
    for verb in verbs:
        with pytest.raises(InvalidFormat, match=rf"\[{clause}\]"):
            verb()
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_the_data_breaks_the_digest(workplace: Path) -> None:
    file = workplace / "sealed" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [problem.clause for problem in validate(file).report.problems] == ["I-02"]
    assert validate(file, data=False).valid


def test_one_flipped_bit_in_a_touched_tensor_of_the_base_is_named(workplace: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    base = Checkpoint.open(workplace / "base")
    flipped = base.read(name).clone()
    flipped.view(torch.int16)[3, 3] ^= 1
    change(workplace / "base", name, flipped)
    found = validate(workplace / "sealed", Checkpoint.open(workplace / "base"))
    assert not found.valid
    assert found.differences == (
        f"{name}: its bytes are not those of the sealed base",
        "root: some tensor is not that of the sealed base",
    )


def test_a_change_elsewhere_is_seen_by_the_root_alone(workplace: Path) -> None:
    change(workplace / "base", "model.norm.weight", torch.zeros(64, dtype=torch.bfloat16))
    found = validate(workplace / "sealed", Checkpoint.open(workplace / "base"))
    assert found.differences == ("root: some tensor is not that of the sealed base",)


def test_a_missing_tensor_is_named(workplace: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change(workplace / "base", name, None)
    found = validate(workplace / "sealed", Checkpoint.open(workplace / "base"))
    assert found.differences is not None
    assert f"{name}: not in this base" in found.differences
    assert any(difference.startswith("schema: ") for difference in found.differences)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_each_tier_is_compared_with_its_own_algorithm(algorithm: str, prepared: Path) -> None:
    base, merged = Checkpoint.open(prepared / "base"), Checkpoint.open(prepared / "merged")
    other = "sha256" if algorithm == "blake3" else "blake3"
    mixed = replace(hash_checkpoint(base, algorithm=algorithm), schema=base.schema(other))
    assert differences(mixed, base) == []
    assert len(differences(mixed, merged)) == 4 + 1  # the four merged tensors, and the root


def test_without_a_hash_nothing_is_proved(prepared: Path) -> None:
    (difference,) = differences(BaseIdentity(id="tiny-llama"), Checkpoint.open(prepared / "base"))
    assert "no base hash" in difference
