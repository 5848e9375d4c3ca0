"""Names past their wrappers."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.wrappers import FUSIONS, Names, normalized


@pytest.mark.parametrize(
    ("path", "bare"),
    [
        ("model.language_model.layers.0.mlp", "layers.0.mlp"),
        ("language_model.model.layers.0.mlp", "layers.0.mlp"),
        ("base_model.model.model.layers.0.mlp", "layers.0.mlp"),
        ("layers.0.mlp", "layers.0.mlp"),
        ("model", "model"),
        ("model.model", "model"),
        ("model.decoder.layers.0.fc1", "decoder.layers.0.fc1"),
        ("model.vision_tower.encoder.layers.0.fc1", "vision_tower.encoder.layers.0.fc1"),
        ("vision_tower.vision_model.encoder.layers.0.fc1.weight", "vision_tower.encoder.layers.0.fc1.weight"),
        ("embed_out", "lm_head"),
        ("embed_out.weight", "lm_head.weight"),
        ("embed_output.weight", "embed_output.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_normalized(path: str, bare: str) -> None:
    assert normalized(path) == bare


def test_an_exact_name_wins_over_one_past_its_wrappers() -> None:
    names = Names(["model.layers.0.q.weight", "layers.0.q.weight"])
    assert names.find("model.layers.0.q") == ["model.layers.0.q.weight"]
    assert names.find("layers.0.q") == ["layers.0.q.weight"]
    assert names.find("transformer.layers.0.q") == ["layers.0.q.weight", "model.layers.0.q.weight"]
    assert names.find("layers.1.q") == []


def test_a_parameter_by_its_own_name() -> None:
    names = Names(["model.experts.gate_up_proj", "model.norm.bias"])
    assert names.find("experts.gate_up_proj") == ["model.experts.gate_up_proj"]
    assert names.find("norm", "bias") == ["model.norm.bias"]
    assert names.find("norm") == []


def test_nearest_names_end_alike() -> None:
    names = Names([f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("attn.q_proj", "mlp.up_proj")])
    assert names.nearest("model.layers.1.self_attn.q_proj")[0] == "model.layers.1.attn.q_proj"
    assert all(name.endswith("q_proj") for name in names.nearest("model.layers.1.self_attn.q_proj"))
    assert names.nearest("zzz") == []


def test_each_alias_is_in_one_place_of_a_fusion() -> None:
    for fusion in FUSIONS:
        aliases = [alias for part in fusion.parts for alias in part]
        assert len(aliases) == len(set(aliases))
        assert [fusion.position(part[0]) for part in fusion.parts] == list(range(len(fusion.parts)))
        assert fusion.position(fusion.fused) is None
