"""Adapters that PEFT wrote, and what PEFT makes of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import BadFile

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

OVERLAPPING = {"q_proj": 2, "layers.0.self_attn.q_proj": 6, r".*\.v_proj": 3}

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "regex of python alone": {"target_modules": r"(?i:.*\.LAYERS\.([01])\.)(?>self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "layers-pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "layers-pattern regex": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(?>l[a-z]+)"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 40, "o_proj": 3},
    },
    "patterns of python alone": {
        "target_modules": ["q_proj", "v_proj", "k_proj"],
        "rank_pattern": {r"layers\.1\.(?i:SELF)_attn\.(q|k)_proj": 7},
        "alpha_pattern": {r"layers\.(\d)\.[^.]*+\.v_proj": 40, r"(?P<x>k)_(?!(?P=x))proj": 3},
    },
    "overlapping": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": OVERLAPPING},
    "reordered ranks": {"target_modules": ["q_proj"], "rank_pattern": OVERLAPPING},
    "rslora-patterns": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 3}},
    "lm-head": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}
LOADABLE = sorted(CONFIGS.keys() - {"reordered ranks"})


def base_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def trained(label: str) -> Any:
    """Return a PEFT model whose factors are random, as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base_model(), LoraConfig(**{"r": 4, "lora_alpha": 10} | CONFIGS[label]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def delta_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return module -> ΔW as PEFT computes it."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check(adapter: Adapter, model: Any) -> None:
    wanted = delta_weights(model)
    assert adapter.updates.keys() == wanted.keys()
    for module, delta in wanted.items():
        torch.testing.assert_close(adapter.updates[module].delta_weight(), delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label", LOADABLE)
def test_delta_weights_are_those_of_peft(tmp_path: Path, label: str) -> None:
    from peft import PeftModel

    trained(label).save_pretrained(tmp_path / "a")
    check(dialects.open_adapter(tmp_path / "a"), PeftModel.from_pretrained(base_model(), tmp_path / "a"))


def test_overlapping_rank_patterns_that_saving_reordered(tmp_path: Path) -> None:
    """PEFT sorts the patterns as it saves, so that another one comes first; then it cannot load its own file."""
    from peft import PeftModel

    trained("reordered ranks").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path)
    assert refusal.value.problems == ("model.layers.0.self_attn.q_proj: its tensors have rank 2, the config says 6",)


@pytest.mark.parametrize("label", LOADABLE)
@pytest.mark.parametrize("dialect", ["peft", "loratools"])
def test_peft_loads_what_is_written(tmp_path: Path, label: str, dialect: str) -> None:
    from peft import PeftModel

    trained(label).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "a")
    # PEFT saves a copy of the head's base weight along; without the base, our format will not take its word for that.
    copied = label == "lm-head" and dialect == "loratools"
    losses = dialects.save_adapter(
        dialects.open_adapter(tmp_path / "a"), tmp_path / "b", dialect=dialect, allow_loss=copied
    )
    assert [loss.where for loss in losses] == ["lm_head.weight"] * copied
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "b")
    check(dialects.open_adapter(tmp_path / "a"), loaded)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_raw_state_dict_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = trained("list")
    model.save_pretrained(tmp_path / "a")
    raw = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}
    assert any(".lora_A.default.weight" in name for name in raw)
    save_file(raw, tmp_path / "a" / "adapter_model.safetensors")
    check(dialects.open_adapter(tmp_path / "a"), model)


def test_a_named_adapter_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = trained("list")
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path)
    adapter = dialects.open_adapter(tmp_path / "other")
    assert {update.scaling for update in adapter.updates.values()} == {3.0}
    check(dialects.open_adapter(tmp_path), trained("list"))


def test_tensors_that_the_config_does_not_target_are_ignored_by_peft(tmp_path: Path) -> None:
    """As the refusal of such a file says."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    model = trained("list")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    stray = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(16, 4)}
    save_file(load_file(file) | stray, file)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).merge_and_unload().state_dict()
    wanted = model.merge_and_unload().state_dict()
    assert all(torch.equal(loaded[tensor], W) for tensor, W in wanted.items())
    with pytest.raises(BadFile, match="k_proj: has tensors, but the config does not target it, so PEFT would ignore"):
        dialects.open_adapter(tmp_path)
