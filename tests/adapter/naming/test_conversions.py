"""The table of transformers' own rules: it is that of the installed version, and is read as transformers reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratools.adapter.naming.conversions import Rule, conversion, natural, table, templated


def test_every_rule_of_the_table_can_be_read() -> None:
    for number in range(len(table()["rules"])):
        told = table()["rules"][number]
        rule = Rule(tuple(told["from"]), tuple(told["to"]), told.get("kind", ""), told.get("offset", 0))
        rule.apply("model.layers.0.self_attn.q_proj.weight")
        assert len(rule.targets) in (1, len(rule.sources)) or told["operations"]


@pytest.mark.parametrize(
    ("told", "name", "expected"),
    [
        (Rule((r"encoder\.layer\.",), ("layers.",)), "vit.encoder.layer.3.x", "vit.layers.3.x"),
        (Rule((r"layers\.(\d+)\.wo",), (r"blocks.\1.o_proj",)), "layers.12.wo.weight", "blocks.12.o_proj.weight"),
        (Rule((r"queries\.(\d+)",), (r"layers.\1.q",), offset=1), "queries.9", "layers.10.q"),
        (Rule(("a", "b"), ("b", "c"), "group"), "x.b", "x.c"),
        (Rule(("attn",), ("self_attn",), scopes=("model.tower.", "tower.")), "tower.attn.q", "tower.self_attn.q"),
        (Rule(("attn",), ("self_attn",), scopes=("model.tower.", "tower.")), "other.attn.q", None),
        (Rule(("w1.weight",), ("gate.weight",)), "w1.weight_scale_inv", None),
    ],
)
def test_a_rule_renames(told: Rule, name: str, expected: str | None) -> None:
    applied = told.apply(name)
    assert (None if applied is None else applied[0]) == expected


def test_names_that_differ_in_large_numbers_are_asked_once() -> None:
    asked: list[str] = []

    def renamed(name: str) -> str:
        asked.append(name)
        return name.replace("mlp", "ffn")

    convert = templated(renamed)
    names = [f"layers.{i}.mlp.experts.{j}.w1" for i in (3, 10, 61) for j in (0, 99, 383)]
    assert [convert(name) for name in names] == [name.replace("mlp", "ffn") for name in names]
    assert len(asked) == 4


def test_the_order_of_a_list_is_that_of_its_numbers() -> None:
    names = [f"experts.{i}.w1" for i in (10, 9, 100, 0)]
    assert sorted(names, key=natural) == [f"experts.{i}.w1" for i in (0, 9, 10, 100)]


def test_a_model_made_of_others_has_the_rules_of_each_below_its_path() -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": {"model_type": "mixtral"}, "vision_config": {"model_type": "clip_vision_model"},
    }  # fmt: skip
    rules = conversion(config)
    assert rules is not None
    old = "language_model.model.layers.1.block_sparse_moe.experts.10.w1.weight"
    renamed = rules.renamed(old)
    assert renamed == "model.language_model.layers.1.mlp.experts.10.w1.weight"
    target = rules.converted(renamed)
    assert target is not None
    assert target[0] == "model.language_model.layers.1.mlp.experts.gate_up_proj"


def test_a_model_that_transformers_does_not_know_has_no_rules() -> None:
    assert conversion({}) is None
    assert conversion({"model_type": "mine", "architectures": ["MineForCausalLM"]}) is None


@pytest.mark.interop
def test_the_table_has_the_rules_of_the_installed_version() -> None:
    transformers = pytest.importorskip("transformers")
    from tests.make.conversion_table import rules

    read: dict[str, Any] = table()
    assert read["transformers"] == transformers.__version__
    ours = {key: [read["rules"][number] for number in numbers] for key, numbers in read["mappings"].items()}
    assert ours == json.loads(json.dumps(rules()))


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llava", "kimi_k25", "detr", "mixtral", "qwen2_5_omni_thinker", "altclip"])
def test_rules_of_a_model_are_those_that_transformers_collects(model_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers.conversion_mapping import get_model_conversion_mapping

    from tests.make.small import built, model_class, names

    cls = model_class(names()[model_type])
    try:
        model = built(cls)
    except ImportError as error:
        pytest.skip(str(error))
    config = {**json.loads(model.config.to_json_string()), "architectures": [cls.__name__]}
    theirs = [
        (tuple(each.source_patterns), tuple(each.target_patterns), each.scope_prefix or "")
        for each in get_model_conversion_mapping(model)
    ]
    ours = conversion(config)
    assert ours is not None
    assert [(r.sources, r.targets, r.scopes[1].rstrip(".") if r.scopes else "") for r in ours.rules] == theirs
