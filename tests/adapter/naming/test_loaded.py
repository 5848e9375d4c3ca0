"""The names of a base's tensors as transformers loads them."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.wrappers import Names

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
HUNYUAN = {"model_type": "hunyuan_vl", "architectures": ["HunYuanVLForConditionalGeneration"]}


def test_a_tensor_is_found_under_the_name_of_its_module() -> None:
    names = Names(["model.layers.0.block_sparse_moe.gate.weight"], MIXTRAL)
    assert names.find("model.layers.0.mlp.gate") == ["model.layers.0.block_sparse_moe.gate.weight"]
    assert names.find("layers.0.mlp.gate") == ["model.layers.0.block_sparse_moe.gate.weight"]


def test_the_older_name_is_found_in_a_base_that_has_the_newer() -> None:
    names = Names(["model.layers.0.mlp.gate.weight"], MIXTRAL)
    assert names.find("model.layers.0.block_sparse_moe.gate") == ["model.layers.0.mlp.gate.weight"]


def test_a_tower_that_elsewhere_wraps_a_model_is_none_here() -> None:
    """`vit` wraps a model of ViT; in HunYuan-VL it is the tower beside a language model with layers of its own."""
    files = ["vit.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    names = Names(files, HUNYUAN)
    assert names.find("model.vision_tower.layers.0.self_attn.q_proj") == files[:1]
    assert names.find("model.language_model.layers.0.self_attn.q_proj") == files[1:]
    assert names.find("model.vit.layers.0.self_attn.q_proj") == files[:1]
    assert names.find("layers.0.self_attn.q_proj") == files[1:]


def test_experts_are_made_into_a_stack_in_the_order_of_their_numbers() -> None:
    files = [f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in range(12) for w in ("w1", "w2", "w3")]
    loaded = Names(files, MIXTRAL).loaded
    assert loaded is not None
    name, made = loaded.made("model.layers.0.mlp.experts.gate_up_proj") or ("", None)
    assert made is not None
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    stored = [[loaded.tensor(each) for each in listed] for listed in made.sources]
    assert stored == [
        [f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in range(12)] for w in ("w1", "w3")
    ]
    assert loaded.made("model.layers.0.mlp.experts.gate_proj") is None


@pytest.mark.parametrize("old", [True, False])
def test_names_that_move_up_by_one_move_together(old: bool) -> None:
    """Kimi's files have fc0 and fc1 where the modules are fc1 and fc2."""
    before, after = "vision_tower.encoder.blocks.1.mlp", "model.vision_tower.layers.1.mlp"
    files = [f"{before}.fc{i}.weight" for i in (0, 1)] if old else [f"{after}.fc{i}.weight" for i in (1, 2)]
    config = {"model_type": "kimi_k25", "architectures": ["Kimi_K25ForConditionalGeneration"]}
    names = Names(files, config)
    for module in (f"{before}.fc0", f"{after}.fc1"):
        assert names.find(module) == files[:1]
    for module in (f"{before}.fc1", f"{after}.fc2"):
        assert names.find(module) == files[1:]


OMNI = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniForConditionalGeneration"]}


@pytest.mark.parametrize("module", ["model.layers", "model.language_model.layers", "thinker.model.layers"])
def test_an_adapter_of_the_thinker_alone_is_one_of_the_whole_model(module: str) -> None:
    files = [f"{part}.model.layers.0.self_attn.q_proj.weight" for part in ("talker", "thinker")]
    assert Names(files, OMNI).find(f"{module}.0.self_attn.q_proj") == files[1:]
    assert Names(files, OMNI).find("talker.model.layers.0.self_attn.q_proj") == files[:1]


def test_what_a_tensor_becomes_part_of() -> None:
    loaded = Names(["model.layers.0.mlp.experts.gate_up_proj"], MIXTRAL).loaded
    assert loaded is not None
    part = loaded.part("model.layers.0.block_sparse_moe.experts.3.w3.weight")
    assert part is not None
    assert part.targets == ("model.layers.0.mlp.experts.gate_up_proj",)
    made = part.made(8)
    assert [listed[3] == part.own for listed in made.sources] == [False, True]
    assert [len(listed) for listed in made.sources] == [8, 8]
