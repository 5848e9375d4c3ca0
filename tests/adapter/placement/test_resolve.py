"""Where updates land: numbers against splitting and transposing by hand, and every refusal by its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import resolve
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.adapter.placement.placing import adapter, delta, lora, merge_by_hand, random_base

H, KV, F = 8, 4, 12


def refusal(given: Adapter, shapes: Mapping[str, tuple[int, ...]], config: Any = None) -> IncompatibleAdapter:
    with pytest.raises(IncompatibleAdapter) as raised:
        resolve(given, shapes, config)
    return raised.value


def test_plain_linear() -> None:
    base = random_base({"model.layers.0.q_proj.weight": (H, F), "model.norm.weight": (H,)})
    given = adapter({"model.layers.0.q_proj": (H, F)})
    merged = merge_by_hand(base, given)
    (update,) = given.updates.values()
    np.testing.assert_allclose(
        merged["model.layers.0.q_proj.weight"] - base["model.layers.0.q_proj.weight"], delta(update)
    )
    np.testing.assert_array_equal(merged["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize("module", ["h.0.attn.c_proj", "transformer.h.0.attn.c_proj"])
@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}])
def test_square_conv1d_is_transposed(module: str, config: dict[str, Any]) -> None:
    """By the model type, or by the biases of its siblings where there is no config."""
    shapes = {"h.0.attn.c_proj.weight": (H, H), "h.0.mlp.c_fc.weight": (H, F), "h.0.mlp.c_fc.bias": (F,)}
    base, given = random_base(shapes), adapter({module: (H, H)})
    merged = merge_by_hand(base, given, config)
    change = merged["h.0.attn.c_proj.weight"] - base["h.0.attn.c_proj.weight"]
    np.testing.assert_allclose(change, delta(given.updates[module]).T)


@pytest.mark.parametrize("config", [{"model_type": "gpt_bigcode"}, {}])
def test_square_linear_called_c_proj_is_not(config: dict[str, Any]) -> None:
    shapes = {"h.0.attn.c_proj.weight": (H, H), "h.0.mlp.c_fc.weight": (F, H), "h.0.mlp.c_fc.bias": (F,)}
    base, given = random_base(shapes), adapter({"h.0.attn.c_proj": (H, H)})
    change = merge_by_hand(base, given, config)["h.0.attn.c_proj.weight"] - base["h.0.attn.c_proj.weight"]
    np.testing.assert_allclose(change, delta(given.updates["h.0.attn.c_proj"]))


def test_square_without_any_sign_is_refused() -> None:
    said = refusal(adapter({"h.0.attn.c_proj": (H, H)}), {"h.0.attn.c_proj.weight": (H, H)})
    assert said.problems == (
        "h.0.attn.c_proj: square, and no config.json tells whether the base stores it [in, out]; "
        "model_type in its config.json says which model this is, or --model-type of merge; "
        "or fan_in_fan_out in the adapter's config does",
    )


REMOTE = {"model_type": "jais"}
IN_OUT = {"h.0.mlp.c_fc.weight": (H, F), "h.0.mlp.c_fc.bias": (F,)}
OUT_IN = {"h.0.mlp.c_fc.weight": (F, H), "h.0.mlp.c_fc.bias": (F,)}


@pytest.mark.parametrize(
    ("name", "biases", "swapped", "transposed"),
    [
        ("c_proj", IN_OUT, True, True), ("c_proj", IN_OUT, False, True), ("c_proj", {}, True, True),
        ("c_proj", OUT_IN, False, False),
        # PEFT takes fan_in_fan_out back where it wraps an nn.Linear, so for other names it is not enough.
        ("q_proj", {}, True, False), ("q_proj", OUT_IN, True, False), ("c_fc2", IN_OUT, True, True),
    ],
)  # fmt: skip
def test_a_model_type_of_remote_code_is_told_by_evidence(
    name: str, biases: dict[str, tuple[int, ...]], swapped: bool, transposed: bool
) -> None:
    module = f"h.0.{name}"
    base = random_base({f"{module}.weight": (H, H), **biases})
    given = replace(adapter({module: (H, H)}), settings={"fan_in_fan_out": swapped})
    change = merge_by_hand(base, given, REMOTE)[f"{module}.weight"] - base[f"{module}.weight"]
    wanted = delta(given.updates[module])
    np.testing.assert_allclose(change, wanted.T if transposed else wanted)


@pytest.mark.parametrize(
    ("biases", "swapped", "reason"),
    [({}, False, "model_type 'jais' does not tell"), (OUT_IN, True, "and the biases say")],
)
def test_without_evidence_or_against_it_a_square_weight_is_refused(
    biases: dict[str, tuple[int, ...]], swapped: bool, reason: str
) -> None:
    given = replace(adapter({"h.0.c_proj": (H, H)}), settings={"fan_in_fan_out": swapped})
    (problem,) = refusal(given, {"h.0.c_proj.weight": (H, H), **biases}, REMOTE).problems
    assert reason in problem


def test_not_square_only_one_way_fits() -> None:
    base, given = random_base({"h.0.c_attn.weight": (H, F)}), adapter({"h.0.c_attn": (F, H)})
    change = merge_by_hand(base, given, REMOTE)["h.0.c_attn.weight"] - base["h.0.c_attn.weight"]
    np.testing.assert_allclose(change, delta(given.updates["h.0.c_attn"]).T)


def test_swapped_shape_is_no_conv1d_by_chance() -> None:
    """Only layers that are Conv1D in some model may be stored [in, out]."""
    said = refusal(adapter({"layers.0.up_proj": (H, F)}), {"layers.0.up_proj.weight": (F, H)})
    assert said.problems == (
        "layers.0.up_proj: its delta weight has shape (8, 12), layers.0.up_proj.weight has (12, 8)",
    )


def test_split_into_fused_qkv_with_grouped_heads() -> None:
    base = random_base({"a.qkv_proj.weight": (H + 2 * KV, H)})
    given = adapter({"a.q_proj": (H, H), "a.k_proj": (KV, H), "a.v_proj": (KV, H)})
    change = merge_by_hand(base, given, {"model_type": "phi3"})["a.qkv_proj.weight"] - base["a.qkv_proj.weight"]
    np.testing.assert_allclose(change, np.concatenate([delta(update) for update in given.updates.values()]))


def test_split_into_fused_gate_up_whatever_the_model() -> None:
    base = random_base({"a.gate_up_proj.weight": (2 * F, H)})
    given = adapter({"a.gate_proj": (F, H), "a.up_proj": (F, H)})
    change = merge_by_hand(base, given)["a.gate_up_proj.weight"] - base["a.gate_up_proj.weight"]
    np.testing.assert_allclose(change, np.concatenate([delta(update) for update in given.updates.values()]))


def test_one_part_leaves_the_others() -> None:
    base = random_base({"a.qkv_proj.weight": (H + 2 * KV, H)})
    given = adapter({"a.k_proj": (KV, H)})
    change = merge_by_hand(base, given, {"model_type": "phi3"})["a.qkv_proj.weight"] - base["a.qkv_proj.weight"]
    np.testing.assert_allclose(change[H : H + KV], delta(given.updates["a.k_proj"]))
    assert not change[:H].any()
    assert not change[H + KV :].any()


def test_split_into_conv1d() -> None:
    base = random_base({"h.0.attn.c_attn.weight": (H, 3 * H)})
    given = adapter({"h.0.attn.q_proj": (H, H), "h.0.attn.v_proj": (H, H)})
    change = (
        merge_by_hand(base, given, {"model_type": "gpt2"})["h.0.attn.c_attn.weight"] - base["h.0.attn.c_attn.weight"]
    )
    np.testing.assert_allclose(change[:, :H], delta(given.updates["h.0.attn.q_proj"]).T)
    np.testing.assert_allclose(change[:, 2 * H :], delta(given.updates["h.0.attn.v_proj"]).T)
    assert not change[:, H : 2 * H].any()


@pytest.mark.parametrize(
    "config", [{"model_type": "bloom", "n_head": 4}, {"model_type": "gpt_neox", "num_attention_heads": 2}]
)
@pytest.mark.parametrize("parts", [("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("v_proj",)])
def test_split_into_fused_by_head(config: dict[str, Any], parts: tuple[str, ...]) -> None:
    """BLOOM and GPT-NeoX store [head, (q, k, v), features of the head, in]."""
    heads = config.get("n_head") or config["num_attention_heads"]
    name = "h.0.self_attention.query_key_value.weight"
    base = random_base({name: (3 * H, H)})
    given = adapter({f"h.0.self_attention.{part}": (H, H) for part in parts})
    merged = merge_by_hand(base, given, config)[name].reshape(heads, 3, H // heads, H)
    before = base[name].reshape(heads, 3, H // heads, H)
    for i, letter in enumerate("qkv"):
        wanted = before[:, i].reshape(H, H).copy()
        for module, update in given.updates.items():
            if module.rpartition(".")[2].startswith({"q": "q", "k": "k", "v": "v"}[letter]):
                wanted += delta(update)
        np.testing.assert_allclose(merged[:, i].reshape(H, H), wanted)


@pytest.mark.parametrize("rows", [(H, KV, KV), (H, H, H)])
def test_fused_into_split(rows: tuple[int, int, int]) -> None:
    names = [f"a.{letter}_proj.weight" for letter in "qkv"]
    base = random_base({name: (count, H) for name, count in zip(names, rows, strict=True)})
    given = adapter({"a.qkv_proj": (sum(rows), H)})
    merged = merge_by_hand(base, given, {"model_type": "llama"})
    change = np.concatenate([merged[name] - base[name] for name in names])
    np.testing.assert_allclose(change, delta(given.updates["a.qkv_proj"]))


def test_fused_by_head_into_split_is_ambiguous() -> None:
    said = refusal(
        adapter({"a.query_key_value": (3 * H, H)}), {f"a.{part}.weight": (H, H) for part in ("query", "key", "value")}
    )
    assert said.problems == (
        "a.query_key_value: ambiguous: the base stores a.query.weight, a.key.weight, a.value.weight, and some models "
        "fuse query_key_value head by head (bloom, gpt_neox, gpt_neox_japanese), others block by block",
    )


@pytest.mark.parametrize(
    ("config", "said"), [({}, "no config.json"), ({"model_type": "falcon"}, "model_type 'falcon'")]
)
def test_order_within_a_fused_weight_is_not_guessed(config: dict[str, Any], said: str) -> None:
    found = refusal(adapter({"a.q_proj": (H, H)}), {"a.query_key_value.weight": (3 * H, H)}, config)
    assert found.problems[0].startswith("a.q_proj: ambiguous: the base stores it inside a.query_key_value.weight")
    assert said in found.problems[0]


@pytest.mark.parametrize(
    ("part", "rows", "config"),
    [
        ("q_proj", 16, {}),  # leaves nothing for k and v
        ("q_proj", 9, {}),  # leaves an odd number
        ("q_proj", 2, {}),  # k and v would have more than q
        ("v_proj", 6, {}),
        ("q_proj", 6, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("k_proj", 2, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
)
def test_impossible_parts_of_a_fused_weight(part: str, rows: int, config: dict[str, Any]) -> None:
    found = refusal(adapter({f"a.{part}": (rows, H)}), {"a.qkv_proj.weight": (16, H)}, {"model_type": "phi3", **config})
    assert found.problems == (
        f"a.{part}: its {rows} output features are no part of a.qkv_proj.weight with shape (16, 8)",
    )


@pytest.mark.parametrize("config", [{}, {"n_head": 3}, {"n_head": 0}, {"n_head": "4"}])
def test_by_head_needs_a_number_of_heads_that_divides(config: dict[str, Any]) -> None:
    found = refusal(
        adapter({"a.key": (H, H)}), {"a.query_key_value.weight": (3 * H, H)}, {"model_type": "bloom", **config}
    )
    assert "is no third of a.query_key_value.weight (24, 8)" in found.problems[0]


def test_several_candidates_are_all_named() -> None:
    shapes = {"model.layers.0.up_proj.weight": (F, H), "backbone.layers.0.up_proj.weight": (F, H)}
    found = refusal(adapter({"transformer.layers.0.up_proj": (F, H)}), shapes)
    assert found.problems == (
        "transformer.layers.0.up_proj: ambiguous: transformer.layers.0.up_proj could be any of "
        "backbone.layers.0.up_proj.weight, model.layers.0.up_proj.weight",
    )


def test_every_unmatched_module_is_listed_with_the_nearest_names() -> None:
    shapes = {f"model.layers.{i}.mlp.{name}.weight": (F, H) for i in range(12) for name in ("up_proj", "fc1")}
    given = adapter({f"model.layers.{i}.feed_forward.up_proj": (F, H) for i in range(12)} | {"nothing.like_it": (F, H)})
    found = refusal(given, shapes)
    assert found.message.endswith("13 problems in 13 modules")
    assert [problem.split(":")[0] for problem in found.problems] == list(given.updates)
    for i in range(12):
        assert f"model.layers.{i}.mlp.up_proj" in found.problems[i].split("nearest: ")[1]


def test_all_kinds_of_problems_at_once_with_both_shapes() -> None:
    shapes = {"a.q_proj.weight": (H, H), "a.norm.weight": (H,), "a.conv.weight": (H, H, 3, 3)}
    given = adapter({"a.q_proj": (H, F), "a.norm": (H, H), "a.conv": (H, H), "a.missing": (H, H)})
    assert [problem.split("; nearest")[0] for problem in refusal(given, shapes).problems] == [
        "a.q_proj: its delta weight has shape (8, 12), a.q_proj.weight has (8, 8)",
        "a.norm: its delta weight has shape (8, 8), a.norm.weight has (8,)",
        "a.conv: its delta weight has shape (8, 8), a.conv.weight has (8, 8, 3, 3)",
        "a.missing: not in the base",
    ]


def test_conv1d_of_another_size_names_how_it_is_stored() -> None:
    found = refusal(adapter({"h.0.c_fc": (F + 1, H)}), {"h.0.c_fc.weight": (H, F)}, {"model_type": "gpt2"})
    assert found.problems == (
        "h.0.c_fc: its delta weight has shape (13, 8), h.0.c_fc.weight (stored [in, out]) has (8, 12)",
    )


def test_two_modules_on_one_place() -> None:
    given = adapter({"model.a.q_proj": (H, H), "transformer.a.q_proj": (H, H)})
    found = refusal(given, {"model.a.q_proj.weight": (H, H)})
    assert found.problems == (
        "transformer.a.q_proj: lands on the same part of model.a.q_proj.weight as model.a.q_proj",
    )


def test_split_and_fused_updates_of_one_weight_clash() -> None:
    given = adapter({"a.qkv_proj": (3 * H, H), "a.k_proj": (H, H)})
    found = refusal(given, {"a.qkv_proj.weight": (3 * H, H)}, {"model_type": "phi3"})
    assert found.problems == ("a.k_proj: lands on the same part of a.qkv_proj.weight as a.qkv_proj",)


def test_an_adapter_without_updates() -> None:
    assert "it would change nothing" in refusal(Adapter({}), {"a.weight": (H, H)}).message


def test_replacements_by_name_and_shape() -> None:
    import torch

    whole = {"score.weight": LazyTensor.of(torch.ones(2, H)), "classifier.bias": LazyTensor.of(torch.ones(3))}
    given = Adapter({"a": lora(H, H)}, whole)
    found = resolve_replacements(given, {"model.score.weight": (2, H), "classifier.bias": (3,), "a.weight": (H, H)})
    assert found == {"model.score.weight": whole["score.weight"], "classifier.bias": whole["classifier.bias"]}
    with pytest.raises(IncompatibleAdapter) as raised:
        resolve_replacements(given, {"score.weight": (3, 2 * H)})
    assert raised.value.problems == ("score.weight: trained with shape (2, 8), the base has (3, 16)",)
