"""A sealed adapter is valid, and knows its base from every other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter.model import BaseIdentity
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.base import differences
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.validate import validate


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
