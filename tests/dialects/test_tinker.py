"""Tinker: stacked and shared experts, the head's name. Files are made by hand, as tinker-cookbook 0.6.1 reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import BadFile, LossyConversion, UnsupportedAdapter

from .adapters import Q0, expect, factors, lora

EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def folder(path: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": "all-linear"} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def experts(name: str, count: int, shared: str = "") -> dict[str, torch.Tensor]:
    pairs = [factors(seed) for seed in range(count)]
    A, B = torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
    return {
        f"{EXPERTS}.{name}.lora_A.weight": A[:1].clone() if shared == "A" else A,
        f"{EXPERTS}.{name}.lora_B.weight": B[:1].clone() if shared == "B" else B,
    }


def test_experts_come_out_one_by_one_and_shared_factors_serve_all(tmp_path: Path) -> None:
    A, B = factors(9)
    head = {
        "base_model.model.model.unembed_tokens.lora_A.weight": A,
        "base_model.model.model.unembed_tokens.lora_B.weight": B,
    }
    attention = {
        "base_model.model.model.layers.0.attn.q_proj.lora_A.weight": A.clone(),
        "base_model.model.model.layers.0.attn.q_proj.lora_B.weight": B.clone(),
    }
    tensors = experts("w1", 3) | experts("w2", 3, "A") | experts("w3", 3, "B") | head | attention
    adapter = dialects.open_adapter(folder(tmp_path / "a", tensors))
    assert adapter.dialect == "tinker"
    expect(adapter, "lm_head", 9, 2.0)
    expect(adapter, Q0, 9, 2.0)
    for i in range(3):
        expect(adapter, f"model.layers.0.mlp.experts.{i}.gate_proj", i, 2.0)
        down, up = (adapter.updates[f"model.layers.0.mlp.experts.{i}.{n}_proj"] for n in ("down", "up"))
        torch.testing.assert_close(down.delta_weight(), 2 * (factors(i)[1] @ factors(0)[0]))
        torch.testing.assert_close(up.delta_weight(), 2 * (factors(0)[1] @ factors(i)[0]))
    assert len(adapter.updates) == 11


def test_an_empty_w3_means_that_there_is_no_gate(tmp_path: Path) -> None:
    empty = {f"{EXPERTS}.w3.lora_{x}.weight": torch.ones(0, 0, 0) for x in "AB"}
    adapter = dialects.open_adapter(folder(tmp_path / "a", experts("w1", 2) | experts("w2", 2) | empty))
    assert set(adapter.updates) == {
        f"model.layers.0.mlp.experts.{i}.{n}_proj" for i in range(2) for n in ("up", "down")
    }


def test_what_does_not_fit_together_is_listed(tmp_path: Path) -> None:
    tensors = experts("w1", 2) | {f"{EXPERTS}.w2.lora_A.weight": torch.ones(2, 4, 3), "strange": torch.ones(1)}
    tensors[f"{EXPERTS}.w3.lora_A.weight"], tensors[f"{EXPERTS}.w3.lora_B.weight"] = (
        torch.ones(2, 4, 3),
        torch.ones(3, 5, 4),
    )
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(folder(tmp_path / "a", tensors))
    assert sorted(refusal.value.problems) == [
        "model.layers.0.mlp.experts.w2: a factor without its partner",
        "model.layers.0.mlp.experts.w3: A (2, 4, 3) and B (3, 5, 4) are no stacked experts",
        "strange: no factor that Tinker writes",
    ]


def test_the_config_decides_as_in_peft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = experts("w1", 2) | experts("w2", 2)
    up, down = (f"model.layers.0.mlp.experts.1.{n}_proj" for n in ("gate", "down"))
    for i, (fields, s_up, s_down) in enumerate(
        (
            ({"use_rslora": True}, 4.0, 4.0),
            ({"alpha_pattern": {"down_proj": 2}}, 2.0, 0.5),
            ({"alpha_pattern": {"down_proj": 2}, "use_rslora": True}, 4.0, 1.0),
            ({"r": 8, "rank_pattern": {r".*_proj": 4}}, 2.0, 2.0),
        )
    ):
        adapter = dialects.open_adapter(folder(tmp_path / f"{i}", tensors, **fields))
        expect(adapter, up, 1, s_up)
        expect(adapter, down, 1, s_down)
    assert not caplog.messages
    adapter = dialects.open_adapter(folder(tmp_path / "b", tensors, use_hyper=2), alpha=16)
    expect(adapter, up, 1, 4.0)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "alpha 16, which the call gives, is taken in place of 8, which the file records",
        "fields that are not known here, and have no effect: use_hyper",
    ]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"r": 8}, "its tensors have rank 4, the config says 8"),
        ({"alpha_pattern": {"w1": 2}}, "alpha_pattern: 'w1' names no module here"),
        ({"use_dora": True}, "no lora_magnitude_vector, and the config says use_dora"),
        ({"use_qalora": True}, "use_qalora = True: QA-LoRA pools"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
        ({"alpha_pattern": [2]}, "alpha_pattern: expected names to numbers"),
        ({"lora_scale": 2.5}, "lora_scale = 2.5: a scaling that PEFT does not have"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises((BadFile, UnsupportedAdapter)) as refusal:
        dialects.open_adapter(folder(tmp_path / "a", experts("w1", 2), **fields))
    assert any(problem in line for line in refusal.value.problems)


def test_it_is_read_only(tmp_path: Path) -> None:
    with pytest.raises(LossyConversion, match="read"):
        dialects.save_adapter(Adapter({Q0: lora(1)}), tmp_path / "a", dialect="tinker")
