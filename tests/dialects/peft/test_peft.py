from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.errors import BadFile, LoraToolsError
from loratools.format.peft_config import derive_config
from loratools.surgery.convert import convert
from tests.dialects.adapters import Q0, Q1, V0, expect, factors, lora, opened, peft_folder, samples, state, write_config
from tests.dialects.contract import DialectContract


class TestContract(DialectContract):
    name = "peft"

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        sealed = BaseIdentity("org/base", schema="blake3:00")
        return {
            "sealed": (Adapter({Q0: lora(0)}, base=sealed), ("base model",)),
            "history": (Adapter({Q0: lora(0)}, provenance=(Step("combine", "loratools"),)), ("provenance",)),
        }

    def own(self, folder: Path) -> list[Path]:
        folder.mkdir()
        return [
            peft_folder(folder / "peft"),
            peft_folder(folder / "dump", state("module.base_model.model.", ".default")),
        ]


def test_scaling_is_alpha_over_r(tmp_path: Path) -> None:
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a"))
    for seed, module in enumerate((Q0, Q1, V0)):
        assert adapter.updates[module].scaling == 2.0
        expect(adapter, module, seed, 8 / 4)
    assert adapter.base == BaseIdentity("org/base")
    assert adapter.settings["task_type"] == "CAUSAL_LM"


def test_rslora_divides_by_the_root_of_r(tmp_path: Path) -> None:
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", use_rslora=True))
    assert adapter.updates[Q0].scaling == 8 / math.sqrt(4)
    expect(adapter, V0, 2, 8 / 2)


def test_missing_r_and_alpha_are_what_peft_takes_and_noted(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", state(rank=8), r=..., lora_alpha=..., peft_type=...)
    adapter, warnings = opened(folder)
    assert adapter.updates[Q0].scaling == 1.0
    config = folder / "adapter_config.json"
    assert warnings == [
        f"{config}: the config does not say r; the rank of each tensor is taken (PEFT takes 8)",
        f"{config}: the config does not say lora_alpha; 8, PEFT's default, is taken",
        f"{config}: the config does not say peft_type; LORA is taken",
    ]


@pytest.mark.parametrize(
    ("patterns", "alphas"),
    [
        ({"q_proj": 16}, (16, 16, 8)),
        ({"layers.0.self_attn.q_proj": 2, "q_proj": 16}, (2, 16, 8)),
        ({"q_proj": 16, "layers.0.self_attn.q_proj": 2}, (16, 16, 8)),  # the first match wins, not the longest
        ({"proj": 2}, (8, 8, 8)),  # a pattern begins at a dot
        ({".*_proj": 2}, (2, 2, 2)),
        ({"layers.1": 2}, (8, 8, 8)),  # and reaches to the end
        ({"^layers.0.self_attn.q_proj": 2}, (8, 8, 8)),
        ({"^model.layers.0.self_attn.q_proj": 2}, (2, 8, 8)),
        ({r"model\.layers\.\d+\.self_attn\.(q|v)_proj": 3}, (3, 3, 3)),
        ({"layers.0.self_attn.[qv]_proj": 5.5}, (5.5, 8, 5.5)),
    ],
)
def test_alpha_patterns_in_the_order_of_the_file(
    tmp_path: Path, patterns: dict[str, float], alphas: tuple[float, ...]
) -> None:
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", alpha_pattern=patterns))
    for seed, (module, alpha) in enumerate(zip((Q0, Q1, V0), alphas, strict=True)):
        assert adapter.updates[module].alpha == alpha
        expect(adapter, module, seed, alpha / 4)


def test_rank_pattern_and_the_rank_of_the_tensor(tmp_path: Path) -> None:
    tensors = state()
    A, B = factors(7, 2)
    tensors |= {f"base_model.model.{V0}.lora_A.weight": A, f"base_model.model.{V0}.lora_B.weight": B}
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", tensors, rank_pattern={"v_proj": 2}))
    expect(adapter, V0, 7, 8 / 2, rank=2)
    expect(adapter, Q0, 0, 8 / 4)


@pytest.mark.parametrize("middle", ["", ".default", ".my_adapter"])
@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "module.base_model.model.",
        "module.module.base_model.model.",
        "_orig_mod.base_model.model.",
        "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module.",
    ],
)
def test_raw_dumps_and_wrappers(tmp_path: Path, prefix: str, middle: str) -> None:
    adapter, warnings = opened(peft_folder(tmp_path / "a", state(prefix, middle)))
    assert set(adapter.updates) == {Q0, Q1, V0}
    expect(adapter, Q1, 1, 2.0)
    note = f"{tmp_path / 'a'}: the adapter's name {middle[1:]!r} was left in the names of the tensors"
    assert warnings == ([note] if middle else [])


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_joined(tmp_path: Path, ending: str) -> None:
    write_config(tmp_path)
    tensors = list(state().items())
    for i in range(3):
        path = tmp_path / f"adapter_model-0000{i + 1}-of-00003.{ending}"
        part = dict(tensors[2 * i : 2 * i + 2])
        save_file(part, path) if ending == "safetensors" else torch.save(part, path)
    adapter = dialects.open_adapter(tmp_path)
    expect(adapter, Q0, 0, 2.0)
    expect(adapter, V0, 2, 2.0)
    (tmp_path / f"adapter_model-00002-of-00003.{ending}").unlink()
    with pytest.raises(BadFile, match=rf"missing shard: adapter_model-00002-of-00003.{ending}$"):
        dialects.open_adapter(tmp_path)
    with pytest.raises(BadFile, match="one shard of several"):
        dialects.open_adapter(tmp_path / f"adapter_model-00001-of-00003.{ending}", dialect="peft")


def test_bin_and_single_files(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    expect(dialects.open_adapter(folder / "adapter_model.safetensors"), V0, 2, 2.0)
    torch.save(state(), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    expect(dialects.open_adapter(folder), V0, 2, 2.0)
    expect(dialects.open_adapter(folder / "adapter_model.bin"), Q1, 1, 2.0)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    torch.save({name: 0 * tensor for name, tensor in state().items()}, folder / "adapter_model.bin")
    expect(dialects.open_adapter(folder), V0, 2, 2.0)


def test_copies_of_the_base_are_kept_apart(tmp_path: Path) -> None:
    tensors = state()
    A, B = factors(5)
    tensors |= {
        "base_model.model.lm_head.lora_A.weight": A,
        "base_model.model.lm_head.lora_B.weight": B,
        "base_model.model.lm_head.base_layer.weight": torch.ones(12, 10),
    }
    folder = peft_folder(tmp_path / "a", tensors, target_modules=["q_proj", "v_proj", "lm_head"])
    adapter = dialects.open_adapter(folder)
    expect(adapter, "lm_head", 5, 2.0)
    assert not adapter.replacements
    assert list(adapter.copies) == ["lm_head.weight"]
    torch.testing.assert_close(adapter.copies["lm_head.weight"].load(), torch.ones(12, 10))


def test_a_target_that_the_model_lacks_is_only_noted(tmp_path: Path) -> None:
    _, warnings = opened(peft_folder(tmp_path / "a", target_modules=["q_proj", "v_proj", "fc1"]))
    assert warnings == [f"{tmp_path / 'a'}: no tensors for these target_modules: fc1"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("alpha_pattern", {"q_proj": 16, "k_proj": 99}, "k_proj"),
        ("alpha_pattern", {"q_proj": 16, "self_attn.q_proj": 99}, "self_attn.q_proj"),  # the first match wins
        ("alpha_pattern", {r".*\.mlp\..*": 99}, r".*\.mlp\..*"),
        ("rank_pattern", {"k_proj": 2, "q_proj": 4}, "k_proj"),
        ("modules_to_save", ["score", "classifier"], "score, classifier"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "mlp.experts.gate_up_proj"),
        ("trainable_token_indices", {"embed_tokens": [1, 2]}, "embed_tokens"),
        ("bias", "all", "all"),
    ],
)
def test_what_a_config_names_and_no_tensor_has_is_said(tmp_path: Path, field: str, value: Any, shown: str) -> None:
    _, warnings = opened(peft_folder(tmp_path / "a", **{field: value}))
    assert warnings == [f"{tmp_path / 'a'}: no tensors for these {field}: {shown}"]


def test_a_note_is_no_setting_that_a_conversion_carries_on(tmp_path: Path) -> None:
    convert(peft_folder(tmp_path / "a", lora_alpha=...), tmp_path / "sealed")
    adapter, warnings = opened(tmp_path / "sealed")
    assert adapter.updates[Q0].scaling == 2.0
    assert warnings == []


def test_unknown_fields_are_noted_unless_they_say_nothing(tmp_path: Path) -> None:
    silent: dict[str, Any] = {"use_super": False, "other": None, "names": [], "nested": {}, "text": ""}
    _, warnings = opened(peft_folder(tmp_path / "a", use_hyper=True, gate=0, deep={"a": 1}, **silent))
    config = tmp_path / "a" / "adapter_config.json"
    assert warnings == [f"{config}: fields that are not known here, and have no effect: deep, gate, use_hyper"]


def test_a_kind_that_appears_is_read_without_a_change_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "toy.py").write_text(
        "from loratools.adapter.kinds import lora\n"
        "def claims(parts):\n    return 'lora_diag' in parts\n"
        "def build(parts, scaling, alpha):\n"
        "    return lora.LoraUpdate(parts['lora_A.weight'], parts['lora_B.weight'], scaling, alpha)\n"
    )
    tensors = state()
    tensors[f"base_model.model.{Q0}.lora_diag"] = torch.ones(4)
    folder = peft_folder(tmp_path / "a", tensors)
    with pytest.raises(LoraToolsError, match="lora_diag"):
        dialects.open_adapter(folder)
    from loratools.adapter import kinds

    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path / "kinds")])
    kinds.names.cache_clear()
    try:
        expect(dialects.open_adapter(folder), Q0, 0, 2.0)
    finally:
        monkeypatch.undo()
        kinds.names.cache_clear()


def test_the_derived_config_says_the_same_numbers() -> None:
    config = derive_config(samples()["ranks"])
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    assert config["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 2}
    assert config["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 2}
    assert config["target_modules"] == sorted([Q0, Q1, V0])
    assert config["use_rslora"] is False
    assert list(config) == sorted(config)
    rs = derive_config(samples()["rslora"])
    assert (rs["use_rslora"], rs["lora_alpha"], rs["alpha_pattern"]) == (True, 8, {})
    odd = derive_config(samples()["scaling"])
    assert odd["lora_alpha"] / 4 == -1.7
    assert odd["alpha_pattern"][r"^model\.layers\.0\.self_attn\.q_proj"] / 4 == 0.1


def test_what_is_written_is_peft_s_layout(tmp_path: Path) -> None:
    dialects.save_adapter(dialects.open_adapter(peft_folder(tmp_path / "a")), tmp_path / "b", dialect="peft")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    written, given = load_file(tmp_path / "b" / "adapter_model.safetensors"), state()
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")
    raw = (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
