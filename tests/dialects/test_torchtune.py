"""torchtune: its names and its order of rows.

Files are made by hand, as `torchtune/models/convert_weights.py` 0.6.1 has them; torchtune itself, where it is
installed, is asked in tests/interop/test_torchtune.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.errors import BadFile, LossyConversion, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor

from .adapters import Q0, V0, expect, factors, lora

HEADS = 2
K1, DOWN = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"


def to_peft(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows as torchtune's own exporter turns them for PEFT (`_permute_lora_matrix`)."""
    out, rank = B.shape
    return B.view(heads, out // heads // 2, 2, rank).transpose(1, 2).reshape(out, rank)


def base(folder: Path, model_type: str) -> Checkpoint:
    folder.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(12, 10)}, folder / "model.safetensors")
    config = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def epoch(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.pt")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


CONFIG = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "peft_type": "LORA"}


def pair(name: str, seed: int) -> dict[str, torch.Tensor]:
    A, B = factors(seed)
    return {f"{name}.lora_a.weight": A, f"{name}.lora_b.weight": B}


def test_rows_of_q_and_k_come_out_as_torchtunes_exporter_has_them(tmp_path: Path) -> None:
    tensors = pair("layers.0.attn.q_proj", 0) | pair("layers.1.attn.k_proj", 1) | pair("layers.0.mlp.w2", 2)
    adapter = dialects.open_adapter(epoch(tmp_path / "a", tensors, CONFIG), base=base(tmp_path / "base", "llama"))
    assert adapter.dialect == "torchtune"
    for seed, module in ((0, Q0), (1, K1)):
        A, B = factors(seed)
        wanted = 2.5 * (to_peft(B, HEADS).double() @ A.double())
        torch.testing.assert_close(adapter.updates[module].delta_weight().double(), wanted, rtol=1e-6, atol=1e-6)
    expect(adapter, DOWN, 2, 2.5)


def test_rows_of_qwen_stay(tmp_path: Path) -> None:
    path = epoch(tmp_path / "a", pair("layers.0.attn.q_proj", 0), CONFIG)
    expect(dialects.open_adapter(path, base=base(tmp_path / "base", "qwen2")), Q0, 0, 2.5)


def test_the_magnitude_goes_with_its_rows(tmp_path: Path) -> None:
    magnitude = torch.arange(1.0, 13.0)
    tensors = pair("layers.0.attn.q_proj", 0) | {"layers.0.attn.q_proj.magnitude": magnitude}
    adapter = dialects.open_adapter(epoch(tmp_path / "a", tensors, CONFIG), base=base(tmp_path / "base", "llama"))
    found = adapter.updates[Q0].parts["lora_magnitude_vector"].load()
    assert torch.equal(found, to_peft(magnitude[:, None], HEADS).flatten())


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    path = epoch(tmp_path / "a", pair("layers.0.attn.q_proj", 0), CONFIG)
    with pytest.raises(UnsupportedAdapter, match="model is not known") as refusal:
        dialects.open_adapter(path)
    assert "--base" in str(refusal.value.hint)
    path = epoch(tmp_path / "b", pair("layers.0.attn.v_proj", 0))
    with pytest.raises(UnsupportedAdapter, match="the scaling is unknown"):
        dialects.open_adapter(path)
    expect(dialects.open_adapter(path, alpha=6), V0, 0, 1.5)
    with pytest.raises(BadFile) as refusal_of_names:
        dialects.open_adapter(epoch(tmp_path / "c", pair("layers.0.attn.v_proj", 0) | {"x": torch.ones(1)}, CONFIG))
    assert refusal_of_names.value.problems[0].startswith("x: no name that torchtune gives")


def test_the_config_decides_as_in_peft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = pair("layers.0.attn.v_proj", 0) | pair("layers.0.mlp.w2", 1)
    for i, (fields, s_v, s_down) in enumerate(
        (
            ({"use_rslora": True}, 5.0, 5.0),
            ({"alpha_pattern": {"mlp.down_proj": 2}}, 2.5, 0.5),
            ({"r": 8, "rank_pattern": {"v_proj": 4, "down_proj": 4}}, 2.5, 2.5),
        )
    ):
        adapter = dialects.open_adapter(epoch(tmp_path / f"{i}", tensors, CONFIG | fields))
        expect(adapter, V0, 0, s_v)
        expect(adapter, DOWN, 1, s_down)
    assert not caplog.messages
    path = epoch(tmp_path / "a", tensors, CONFIG | {"use_hyper": True, "use_rslora": True})
    expect(dialects.open_adapter(path, alpha=6), V0, 0, 3.0)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "alpha 6, which the call gives, is taken in place of 10, which the file records",
        "fields that are not known here, and have no effect: use_hyper",
    ]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"r": 8}, "its tensors have rank 4, the config says 8"),
        ({"alpha_pattern": {"attn.output_proj": 2}}, "alpha_pattern: 'attn.output_proj' names no module here"),
        ({"use_dora": True}, "no lora_magnitude_vector, and the config says use_dora"),
        ({"peft_type": "LOHA"}, "peft_type = LOHA: only LORA is read"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises((BadFile, UnsupportedAdapter)) as refusal:
        dialects.open_adapter(epoch(tmp_path / "a", pair("layers.0.attn.v_proj", 0), CONFIG | fields))
    assert any(problem in line for line in refusal.value.problems)


def test_a_folder_with_the_exported_file_too_is_read_as_peft(tmp_path: Path) -> None:
    folder = epoch(tmp_path / "a", pair("layers.0.attn.q_proj", 0), CONFIG)
    A, B = factors(0)
    exported = {"lora_A.weight": A, "lora_B.weight": to_peft(B, HEADS)}
    save_file({f"base_model.model.{Q0}.{p}": t for p, t in exported.items()}, folder / "adapter_model.safetensors")
    adapter = dialects.open_adapter(folder)
    assert adapter.dialect == "peft"
    alone = epoch(tmp_path / "b", pair("layers.0.attn.q_proj", 0), CONFIG)
    ours = dialects.open_adapter(alone, base=base(tmp_path / "base", "llama"))
    torch.testing.assert_close(ours.updates[Q0].delta_weight(), adapter.updates[Q0].delta_weight())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_there_and_back(tmp_path: Path, model_type: str) -> None:
    known = {"base_config": {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}}
    adapter = Adapter({Q0: lora(1), K1: lora(2, 2, 8), "lm_head": lora(3, 4, 8, 0.3)}, settings=known)
    dialects.save_adapter(adapter, tmp_path / "a", dialect="torchtune")
    again = dialects.open_adapter(tmp_path / "a", base=base(tmp_path / "base", model_type))
    assert again.updates.keys() == adapter.updates.keys()
    for module, update in adapter.updates.items():
        torch.testing.assert_close(again.updates[module].delta_weight(), update.delta_weight(), rtol=1e-6, atol=2e-6)


def test_losses(tmp_path: Path) -> None:
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(Adapter({Q0: lora(1)}), tmp_path / "a", dialect="torchtune")
    assert refusal.value.problems[0].startswith("model: not known without the base model (--base)")
    known = {"base_config": {"model_type": "qwen2"}}
    conv = {
        "lora_A.weight": LazyTensor.of(torch.ones(2, 3, 1, 1)),
        "lora_B.weight": LazyTensor.of(torch.ones(4, 2, 1, 1)),
    }
    strange = Adapter({Q0: lora(1), "x": lora(2), "c": kinds.get("conv").build(conv, 1.0, 2.0)}, settings=known)
    lost = dialects.save_adapter(strange, tmp_path / "a", dialect="torchtune", allow_loss=True)
    assert [loss.where for loss in lost] == ["c", "x"]
