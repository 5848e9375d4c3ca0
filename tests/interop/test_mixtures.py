"""Mixtures trained the usual way with transformers 5, whose target_modules PEFT turns into parameters: as PEFT merges.

Each model is saved as transformers does, under the names of its publisher, and as it is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.surgery.merge import merge
from tests.surgery.models import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:The following \\w+_pattern keys")]

SIDES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
    "image_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**SIDES, **EXPERTS, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {**SIDES, **EXPERTS},
    "mixtral": {**SIDES, "num_local_experts": 4},
    "olmoe": {**SIDES, **EXPERTS},
    "glm4_moe": {**SIDES, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {**SIDES, **ROUTED, **LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_oss": {**SIDES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SIDES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {**SIDES, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 12},
    "aria_text": {**SIDES, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "nemotron_h": {
        **SIDES, **ROUTED, "layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 8,
        "n_group": 1, "topk_group": 1, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1,
    },
    "deepseek_v4": {
        **SIDES, **ROUTED, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 4, "index_n_heads": 2,
        "index_head_dim": 8, "index_topk": 4, "layer_types": None, "mlp_layer_types": None,
    },
    "glm4v_moe": {
        "text_config": {
            **SIDES, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "rope_parameters": ROPE,
        },
        "vision_config": VISION,
    },
    "qwen3_vl_moe": {
        "text_config": {**SIDES, **EXPERTS, "rope_parameters": ROPE},
        "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
}  # fmt: skip

USUAL = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS: dict[str, dict[str, Any]] = {
    "usual": USUAL,
    "all": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj|w1|w2|w3)"},
    "stacks": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}

pytestmark.append(pytest.mark.slow)


def small(model_type: str) -> torch.nn.Module:
    """Return a random model of a type."""
    config = transformers.CONFIG_MAPPING[model_type].from_dict(dict(MODELS[model_type]))
    of_images = "text_config" in MODELS[model_type]
    auto = transformers.AutoModelForImageTextToText if of_images else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: torch.nn.Module = auto.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trained(make: Callable[[], torch.nn.Module], folder: Path, **targets: Any) -> None:
    """Write base/, memory/ and adapter/, and PEFT's merge under both namings."""
    model = make()
    for name, published in (("base", True), ("memory", False)):
        model.save_pretrained(folder / name, save_original_format=published)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **targets))
    factors = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    assert factors
    for parameter in factors:
        torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    for name, published in (("base", True), ("memory", False)):
        merged.save_pretrained(folder / f"{name}-expected", save_original_format=published)


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= 1e-5


def cases() -> list[tuple[str, str]]:
    """Pair models with targets; the routers of some have another name."""
    without = {(model, "router") for model in ("gpt_oss", "granitemoe", "granitemoeshared", "aria_text", "nemotron_h")}
    return [(model, name) for model in MODELS for name in TARGETS if (model, name) not in without]


@pytest.mark.parametrize(("model_type", "name"), cases())
def test_a_mixture_merges_as_peft_merges_it(model_type: str, name: str, tmp_path: Path) -> None:
    targets = dict(TARGETS[name])
    if model_type == "mixtral" and name == "usual":
        targets["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    trained(lambda: small(model_type), tmp_path, **targets)
    for base in ("base", "memory"):
        merge(tmp_path / base, tmp_path / "adapter", tmp_path / f"{base}-merged")
        found, wanted = load(tmp_path / f"{base}-merged"), load(tmp_path / f"{base}-expected")
        assert found.keys() == wanted.keys()
        assert not [tensor for tensor in wanted if not close(found[tensor], wanted[tensor])]


def one_by_one(base: Path, folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Write an adapter of every projection of these names in a published base; return W + 4·B·A in float64."""
    generator = torch.Generator().manual_seed(1)
    tensors, wanted = {}, {name: W.double() for name, W in load(base).items() if W.is_floating_point()}
    for name, W in wanted.items():
        if name.split(".")[-2] in names and name.endswith(".weight") and W.dim() == 2:
            A = torch.randn(2, W.shape[1], generator=generator) * 0.3
            B = torch.randn(W.shape[0], 2, generator=generator) * 0.3
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            wanted[name] = W + 4 * (B.double() @ A.double())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": sorted(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert sum(".experts." in name for name in tensors) >= 16
    return wanted


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v4", "nemotron_h", "olmoe"])
def test_experts_one_by_one_of_published_names_merge_into_either_naming(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    names = {"w1", "w2", "w3"} if model_type in ("mixtral", "deepseek_v4") else {"gate_proj", "up_proj", "down_proj"}
    wanted = one_by_one(tmp_path / "base", tmp_path / "adapter", names)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "base-merged")
    merge(tmp_path / "memory", tmp_path / "adapter", tmp_path / "memory-merged")
    model.load_state_dict(load(tmp_path / "memory-merged"))
    model.save_pretrained(tmp_path / "published")
    for folder in ("base-merged", "published"):
        found = load(tmp_path / folder)
        assert found.keys() >= wanted.keys()
        assert not [tensor for tensor in wanted if not close(found[tensor], wanted[tensor])]
