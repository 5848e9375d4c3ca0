"""mistral-finetune: its names, its scaling, and rows of q and k in the order of transformers, by its formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import dialects
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.surgery.models import random

DIM, HEADS, KV_HEADS, HEAD, INNER, R = 16, 4, 2, 4, 24, 3
PARAMETERS = {
    "dim": DIM, "n_layers": 2, "head_dim": HEAD, "hidden_dim": INNER, "n_heads": HEADS, "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-5, "vocab_size": 32, "moe": None,
    "lora": {"enable": True, "rank": R, "dropout": 0.0, "scaling": 2.5},
}  # fmt: skip
SIDES = {
    "attention.wq": (HEADS * HEAD, DIM), "attention.wk": (KV_HEADS * HEAD, DIM), "attention.wv": (KV_HEADS * HEAD, DIM),
    "attention.wo": (DIM, HEADS * HEAD), "feed_forward.w1": (INNER, DIM), "feed_forward.w2": (DIM, INNER),
    "feed_forward.w3": (INNER, DIM),
}  # fmt: skip
NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def adapter(folder: Path, parameters: dict[str, Any] | None = PARAMETERS, **more: Tensor) -> dict[str, Tensor]:
    """Write lora.safetensors of two layers; return ΔW by Mistral's name of the weight."""
    folder.mkdir()
    tensors, deltas = dict(more), {}
    for layer in (0, 1):
        for i, (name, (out, inner)) in enumerate(SIDES.items()):
            A, B = random(R, inner, seed=10 * layer + i), random(out, R, seed=10 * layer + i + 50)
            module = f"layers.{layer}.{name}"
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            deltas[f"{module}.weight"] = 2.5 * (B.double() @ A.double())
    save_file(tensors, folder / "lora.safetensors")
    if parameters is not None:
        (folder / "params.json").write_text(json.dumps(parameters))
    return deltas


def permuted(W: Tensor, heads: int) -> Tensor:
    """Return rows as transformers has them, by the formula of its conversion of Mistral's weights."""
    return W.view(heads, W.shape[0] // heads // 2, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def in_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, W in weights.items():
        _, layer, target = name.removesuffix(".weight").split(".", 2)
        heads = {"attention.wq": HEADS, "attention.wk": KV_HEADS}.get(target)
        found[f"model.layers.{layer}.{NAMES[target]}.weight"] = permuted(W, heads) if heads else W
    return found


@pytest.fixture
def own() -> dict[str, Tensor]:
    """Weights under Mistral's names."""
    shapes = {f"layers.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in SIDES.items()}
    return {name: random(*shape, seed=200 + i) for i, (name, shape) in enumerate(shapes.items())}


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: W.contiguous() for name, W in weights.items()}, folder / "model.safetensors")
    config = {"model_type": "mistral", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def test_merged_into_either_naming_it_is_the_same_model(own: dict[str, Tensor], tmp_path: Path) -> None:
    deltas = adapter(tmp_path / "lora")
    wanted = {name: W.double() + deltas[name] for name, W in own.items()}
    for name, weights, expected in (
        ("mistral", own, wanted), ("transformers", in_transformers(own), in_transformers(wanted))
    ):  # fmt: skip
        merge(save(tmp_path / name, weights), tmp_path / "lora", tmp_path / f"{name}-merged")
        found = load_file(tmp_path / f"{name}-merged" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[tensor].double(), W, atol=1e-6) for tensor, W in expected.items())


def test_converted_it_has_the_scaling_of_the_run(tmp_path: Path) -> None:
    deltas = in_transformers(adapter(tmp_path / "lora"))
    convert(tmp_path / "lora" / "lora.safetensors", tmp_path / "peft", to="peft")
    opened = dialects.open_adapter(tmp_path / "peft")
    assert {f"{module}.weight" for module in opened.updates} == deltas.keys()
    for module, update in opened.updates.items():
        assert (update.rank, update.scaling) == (R, 2.5)
        assert torch.allclose(update.delta_weight().double(), deltas[f"{module}.weight"], atol=1e-6)


def test_norms_are_replaced_and_experts_have_mixtrals_names(tmp_path: Path) -> None:
    expert = "layers.0.feed_forward.experts.3.w2"
    more = {
        "layers.1.ffn_norm.weight": random(DIM, seed=1), "layers.1.attention_norm.weight": random(DIM, seed=2),
        "norm.weight": random(DIM, seed=3),
        f"{expert}.lora_A.weight": random(R, INNER, seed=4), f"{expert}.lora_B.weight": random(DIM, R, seed=5),
    }  # fmt: skip
    adapter(tmp_path / "lora", **more)
    opened = dialects.open_adapter(tmp_path / "lora")
    assert set(opened.replacements) == {
        "model.layers.1.post_attention_layernorm.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight",
    }  # fmt: skip
    assert "model.layers.0.block_sparse_moe.experts.3.w2" in opened.updates


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        (None, UnsupportedAdapter, "no lora.scaling"),
        ({**PARAMETERS, "lora": {"scaling": "two"}}, BadFile, "lora.scaling: expected a number"),
        ({"lora": {"scaling": 2.0}}, UnsupportedAdapter, "heads are unknown"),
        ({**PARAMETERS, "n_heads": 3}, BadFile, "16 output features are not those of 3 heads"),
    ],
)
def test_what_is_not_known_is_said(
    parameters: dict[str, Any] | None, error: type[Exception], says: str, tmp_path: Path
) -> None:
    adapter(tmp_path / "lora", parameters)
    with pytest.raises(error) as refusal:
        dialects.open_adapter(tmp_path / "lora")
    assert says in str(refusal.value)


def test_strange_names_and_lone_factors_are_listed(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", **{"layers.0.attention.wq.weight": random(2, 2), "output.lora_A.weight": random(2, 2)})
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path / "lora")
    assert len(refusal.value.problems) == 2
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    lone = {name: W for name, W in tensors.items() if name.endswith("wo.lora_A.weight")}
    save_file(lone, tmp_path / "lora" / "lora.safetensors")
    with pytest.raises(BadFile, match="its partner"):
        dialects.open_adapter(tmp_path / "lora")


def test_an_alpha_of_the_user_counts(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", None)
    with pytest.raises(UnsupportedAdapter, match="heads are unknown"):
        dialects.open_adapter(tmp_path / "lora", alpha=6)
    (tmp_path / "lora" / "params.json").write_text(json.dumps({"n_heads": HEADS, "n_kv_heads": KV_HEADS}))
    opened = dialects.open_adapter(tmp_path / "lora", alpha=6)
    assert {update.scaling for update in opened.updates.values()} == {2.0}


def test_an_adapter_of_z_image_without_its_component_is_not_mistrals(tmp_path: Path) -> None:
    """Z-Image calls its MLPs as Mistral does, and its attentions otherwise."""
    tensors = {}
    for module in ("layers.0.attention.to_q", "layers.0.feed_forward.w1"):
        tensors |= {f"{module}.lora_A.weight": random(2, 8, seed=1), f"{module}.lora_B.weight": random(8, 2, seed=2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert dialects.open_adapter(tmp_path / "lora.safetensors").dialect == "diffusers"
