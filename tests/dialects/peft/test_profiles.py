"""Profiles: what a consumer of PEFT adapters reads is what it gets, with every ΔW the same, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.dialects.peft.profiles import apply
from loratools.errors import LossyConversion, UnknownKind
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import Q0, Q1, V0, lora

V1 = "model.layers.1.self_attn.v_proj"
MIXED = {Q0: lora(1, 2, 8), V0: lora(2, 4, 8, 8 / 2), Q1: lora(3, 3, 5, 5 / 3**0.5), V1: lora(4, 1, 1, 0.3)}


def written(adapter: Adapter, folder: Path) -> dict[str, Any]:
    dialects.save_adapter(adapter, folder, dialect="peft")
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("profile", ["serving", "sglang"])
def test_one_rank_one_scaling_and_no_patterns(tmp_path: Path, profile: str) -> None:
    config = written(apply(Adapter(MIXED), profile), tmp_path / "a")
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, ["q_proj", "v_proj"])
    again = dialects.open_adapter(tmp_path / "a")
    for module, update in MIXED.items():
        assert again.updates[module].rank == 4
        # What the consumer computes: lora_alpha / r of the config, whatever else it says.
        A, B = (again.updates[module].parts[f"lora_{x}.weight"].load().double() for x in "AB")
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * (B @ A), update.delta_weight().double(),
                                   rtol=1e-5, atol=2e-6)  # fmt: skip


def test_powers_of_two_are_folded_exactly(tmp_path: Path) -> None:
    adapter = Adapter({Q0: lora(1, 4, 8, dtype=torch.bfloat16), Q1: lora(2, 4, 16, dtype=torch.bfloat16)})
    served = apply(adapter, "serving")
    for module, update in adapter.updates.items():
        assert torch.equal(served.updates[module].delta_weight(), update.delta_weight())
        assert served.updates[module].parts["lora_B.weight"].dtype == "BF16"


def test_every_layer_is_present(tmp_path: Path) -> None:
    some = Adapter({Q0: lora(1), Q1: lora(2), V1: lora(3)})
    with pytest.raises(LossyConversion) as refusal:
        apply(some, "serving")
    assert refusal.value.problems == ("model.layers.*.self_attn.v_proj: no update in layers 0 of 2",)
    base = {f"model.language_model.layers.{i}.self_attn.{n}_proj.weight": (12, 10) for i in range(4) for n in "qkv"}
    served = apply(some, "serving", base)
    assert served.updates.keys() == {f"model.layers.{i}.self_attn.{n}_proj" for i in range(4) for n in "qv"}
    for module, update in served.updates.items():
        wanted = some.updates[module].delta_weight() if module in some.updates else torch.zeros(12, 10)
        torch.testing.assert_close(update.delta_weight(), wanted)


def test_short_targets_only_where_they_match_nothing_else(tmp_path: Path) -> None:
    adapter = Adapter({Q0: lora(1)})
    base = {f"{Q0}.weight": (12, 10), "vision.layers.0.self_attn.q_proj.weight": (12, 10)}
    assert written(apply(adapter, "serving", base), tmp_path / "a")["target_modules"] == [Q0]
    assert written(apply(adapter, "serving"), tmp_path / "b")["target_modules"] == ["q_proj"]


def test_what_is_refused_is_listed(tmp_path: Path) -> None:
    magnitude = {"lora_magnitude_vector": LazyTensor.of(torch.ones(12))}
    dora = kinds.get("dora").build({**lora(1).parts, **magnitude}, 2.0, 8.0)
    bias = kinds.get("lora").build({**lora(1).parts, "lora_B.bias": LazyTensor.of(torch.ones(12))}, 2.0, 8.0)
    head = {"lm_head.weight": LazyTensor.of(torch.ones(2, 2)), "score.weight": LazyTensor.of(torch.ones(2, 2))}
    adapter = Adapter({Q0: dora, V0: bias, "model.layers.3.self_attn.q_proj": lora(1, 600, 8)}, head)
    with pytest.raises(LossyConversion, match="vllm would refuse") as refusal:
        apply(adapter, "vllm")
    assert refusal.value.problems == (
        f"{Q0}: updates of kind dora are not applied",
        f"{V0}: lora_B.bias is not applied",
        "model.layers.3.self_attn.q_proj: rank 600, at most 512 is loaded",
        "lm_head.weight: a tensor trained whole is not loaded",
    )
    with pytest.raises(LossyConversion) as refusal:
        apply(Adapter({Q0: lora(1), Q1: lora(2), V1: lora(3)}), "sglang")
    assert refusal.value.problems == (f"{Q0}: it is loaded only together with {V0}, which has no update",)
    with pytest.raises(UnknownKind, match="there are serving, vllm, sglang"):
        apply(adapter, "tgi")


def test_vllm_keeps_patterns_and_rslora(tmp_path: Path) -> None:
    assert apply(Adapter(MIXED), "vllm").updates == MIXED
