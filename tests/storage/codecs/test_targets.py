"""Groups of compressed-tensors: by name before pattern before class; hostile patterns name nothing, in bounded time."""

from __future__ import annotations

from loratools.storage.codecs._targets import group_of, listed, matches

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"


def statement(**targets: list[str]) -> dict[str, object]:
    groups = {name: {"targets": each, "weights": {"num_bits": i}} for i, (name, each) in enumerate(targets.items())}
    return {"format": "pack-quantized", "config_groups": groups}


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class() -> None:
    stated = statement(a=["Linear"], b=["re:.*mlp.*"], c=[Q])
    bits = {path: (group_of(stated, path) or ({}, None))[0].get("num_bits") for path in (Q, UP, "lm_head")}
    assert bits == {Q: 2, UP: 1, "lm_head": 0}


def test_one_group_is_everybody_s_and_of_several_none_is() -> None:
    assert group_of(statement(a=["re:language_model.*"]), Q) == ({"num_bits": 0}, "pack-quantized")
    assert group_of(statement(a=["re:language_model.*"], b=["vision"]), Q) is None
    assert group_of({}, Q) is None


def test_a_group_s_own_format_wins() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "format": "float-quantized"}
    assert group_of({"format": "mixed-precision", "config_groups": {"a": group}}, Q) == (
        {"num_bits": 8},
        "float-quantized",
    )
    group["format"] = ""
    assert group_of({"format": "mixed-precision", "config_groups": {"a": group}}, Q) == ({"num_bits": 8}, None)


def test_hostile_patterns_name_nothing() -> None:
    slow = "re:(?:a|aa)+$"
    assert not matches(slow, "a" * 200 + "b")
    assert not matches(slow, "aaa")  # once too slow is too slow
    assert not matches("re:(.{99}){99}{99}", Q)
    assert not matches("re:(", Q)
    assert matches("re:.*q_proj$", Q)


def test_a_list_gets_what_it_does_not_name_yet() -> None:
    assert listed(["lm_head", "re:.*mlp.*"], [Q, UP, "lm_head"]) == ["lm_head", "re:.*mlp.*", Q]
    assert listed(None, [Q]) == [Q]
