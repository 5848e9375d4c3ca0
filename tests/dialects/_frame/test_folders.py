"""Adapters in folders: the only one is taken, which is said; of several none is guessed, the newest is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.errors import BadFile, UnknownKind
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary, inspect
from tests.dialects.adapters import opened, state


def peft_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(state(), folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def checkpoint(folder: Path) -> Path:
    """Write what transformers' trainer saves, with DeepSpeed's shares of the optimizer."""
    peft_folder(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.ones(2)}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "global_step500").mkdir()
    torch.save({"module": torch.ones(2)}, folder / "global_step500" / "mp_rank_00_model_states.pt")
    return folder


def test_a_checkpoint_is_an_adapter_and_its_state_is_passed_over(tmp_path: Path) -> None:
    adapter, warnings = opened(checkpoint(tmp_path / "checkpoint-500"))
    assert len(adapter.updates) == 3
    assert not warnings


@pytest.mark.parametrize(
    "inside", ["checkpoint-500", "0_Transformer", "a/b/c", "checkpoints/checkpoint_10/consolidated"]
)
def test_the_only_one_is_taken_and_said(inside: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / inside)
    torch.save({}, tmp_path / "run" / "training_args.bin")
    adapter, warnings = opened(tmp_path / "run")
    assert adapter.dialect == "peft"
    assert [warning for warning in warnings if f"the only one below it is taken, {inside}" in warning]
    summary = inspect(tmp_path / "run")
    assert isinstance(summary, AdapterSummary)
    assert len(summary.modules) == 3
    assert dialects.open_adapter(tmp_path / "run", dialect="peft").updates.keys() == adapter.updates.keys()


def test_of_checkpoints_the_newest_is_named_and_none_is_taken(tmp_path: Path) -> None:
    for step in (500, 1000, 1500, 900):
        checkpoint(tmp_path / f"checkpoint-{step}")
    with pytest.raises(UnknownKind) as refusal:
        dialects.open_adapter(tmp_path)
    assert list(refusal.value.problems) == [f"checkpoint-{step}" for step in (500, 900, 1000, 1500)]
    assert refusal.value.hint == f"Give the folder of one: the newest checkpoint is {tmp_path / 'checkpoint-1500'}"


def test_of_several_none_is_guessed(tmp_path: Path) -> None:
    peft_folder(tmp_path / "writer")
    peft_folder(tmp_path / "painter")
    with pytest.raises(UnknownKind) as refusal:
        dialects.open_adapter(tmp_path)
    assert list(refusal.value.problems) == ["painter", "writer"]
    assert "2 adapters are in its folders" in refusal.value.message
    assert "newest" not in str(refusal.value.hint)


def test_beside_weights_of_another_kind_it_is_named_and_not_taken(tmp_path: Path) -> None:
    peft_folder(tmp_path / "adapter")
    save_file({"w.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownKind, match="an adapter is in one of its folders") as refusal:
        dialects.open_adapter(tmp_path)
    assert list(refusal.value.problems) == ["adapter"]
    assert isinstance(inspect(tmp_path), CheckpointSummary)


def test_an_adapter_wins_over_its_own_checkpoints(tmp_path: Path) -> None:
    peft_folder(tmp_path / "run")
    checkpoint(tmp_path / "run" / "checkpoint-500")
    adapter, warnings = opened(tmp_path / "run")
    files = {lazy.file.parent for lazy in adapter.tensors().values() if lazy.file}
    assert files == {tmp_path / "run"}
    assert not warnings


def test_a_damaged_one_is_told_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    (peft_folder(tmp_path / "run" / "checkpoint-5") / "adapter_model.safetensors").write_bytes(b"{")
    with pytest.raises(BadFile, match=r"checkpoint-5/adapter_model\.safetensors"):
        dialects.open_adapter(tmp_path / "run")


def test_a_sentence_transformer_is_read_and_its_other_modules_are_named(tmp_path: Path) -> None:
    """As sentence-transformers saves it: the adapter in the folder itself, a trained Dense in one of its own."""
    peft_folder(tmp_path / "st")
    (tmp_path / "st" / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "T"}]))
    for name in ("1_Pooling", "2_Dense"):
        (tmp_path / "st" / name).mkdir()
        (tmp_path / "st" / name / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "st" / "2_Dense" / "model.safetensors")
    adapter, warnings = opened(tmp_path / "st")
    assert len(adapter.updates) == 3
    assert [warning for warning in warnings if warning.endswith("not looked at: 2_Dense/model.safetensors")]


def test_links_and_empty_folders_hold_none(tmp_path: Path) -> None:
    peft_folder(tmp_path / "elsewhere")
    (tmp_path / "run" / "empty").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnknownKind, match="no dialect knows this folder"):
        dialects.open_adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "empty")


def test_a_folder_of_files_that_are_adapters_is_several(tmp_path: Path) -> None:
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{flat}.lora_down.weight": torch.ones(2, 8), f"{flat}.lora_up.weight": torch.ones(8, 2)}
    for name in ("a", "b"):
        save_file(pair, tmp_path / f"{name}.safetensors")
    with pytest.raises(UnknownKind) as caught:
        dialects.open_adapter(tmp_path)
    assert caught.value.message == f"{tmp_path}: 2 files of adapters: a.safetensors, b.safetensors"
    assert f"--each {tmp_path}" in (caught.value.hint or "")
    assert not caught.value.problems
