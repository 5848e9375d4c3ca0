"""What a file leaves open of a stack is settled by shapes, by the class, or asked for: never by the alphabet."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from loratools.adapter.kinds.experts import ExpertsUpdate, Rule
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.stacks import as_peft_has_it, settled
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.adapter.placement.test_experts import change
from tests.surgery.models import random

EXPERTS, RANK, H = 3, 2, 4
NAME = "model.layers.0.mlp.experts"


def stack(out: int, inner: int, parameter: str, rule: Rule = "model", stated: bool | None = None) -> ExpertsUpdate:
    A, B = random(EXPERTS * RANK, inner, seed=out), random(out, RANK * EXPERTS, seed=inner + 50)
    return ExpertsUpdate(LazyTensor.of(A), LazyTensor.of(B), 1.5, 3.0, EXPERTS, parameter, stated, rule)


def wrapped(
    outs: list[tuple[int, int]], parameters: list[str], rule: Rule = "model", stated: bool | None = None
) -> dict[str, Any]:
    """Return wrappers of one module, innermost first, each of which may be for any of the parameters."""
    updates: dict[str, Any] = {}
    for depth, sides in enumerate(outs):
        first, *others = parameters[depth], *(name for name in parameters if name != parameters[depth])
        alternatives = {other: stack(*sides, other, rule, stated) for other in others}
        own = stack(*sides, first, rule)
        updates[NAME + ".base_layer" * (len(outs) - 1 - depth)] = ExpertsUpdate(
            own.A, own.B, 1.5, 3.0, EXPERTS, first, stated, rule, alternatives
        )
    return updates


@pytest.mark.parametrize(
    ("rule", "model_type", "turned"),
    [
        ("model", "qwen3_moe", False), ("model", "gpt_oss", True), ("model", "aria", True), ("model", "llama4", False),
        ("inverse", "qwen3_moe", True), ("inverse", "gpt_oss", False), ("in_out", "qwen3_moe", True),
        ("in_out", "gpt_oss", True), ("in_out", "unheard_of", True), ("out_in", "gpt_oss", False),
        ("model", "unheard_of", "--model-type"), ("inverse", "unheard_of", "--model-type"),
        ("unknown", "qwen3_moe", "peft_version"), ("unknown", "unheard_of", "peft_version"),
    ],
)  # fmt: skip
def test_a_square_stack_alone(rule: Rule, model_type: str, turned: bool | str) -> None:
    update, shapes = stack(H, H, "down_proj", rule), {f"{NAME}.down_proj": (EXPERTS, H, H)}
    if isinstance(turned, str):
        with pytest.raises(IncompatibleAdapter, match=turned):
            change({NAME: update}, shapes, model_type=model_type)
        return
    delta = update.delta_weight()
    found = change({NAME: update}, shapes, model_type=model_type)[f"{NAME}.down_proj"]
    assert torch.allclose(found, delta.transpose(1, 2) if turned else delta, atol=1e-6)


@pytest.mark.parametrize("rule", ["model", "inverse", "in_out", "unknown"])
def test_the_other_stack_of_the_module_shows_how_a_square_one_lies(rule: Rule) -> None:
    """Whatever PEFT and class, gate_up_proj (E, 2I, H) with A (E·r, H) is straight, and down_proj is as it is."""
    updates = wrapped([(2 * H, H), (H, H)], ["gate_up_proj", "down_proj"], rule)
    shapes = {f"{NAME}.gate_up_proj": (EXPERTS, 2 * H, H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    found = change(updates, shapes, model_type="unheard_of")
    assert torch.allclose(found[f"{NAME}.down_proj"], updates[NAME].delta_weight(), atol=1e-6)
    other = {f"{NAME}.gate_up_proj": (EXPERTS, H, 2 * H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    found = change(updates, other, model_type="unheard_of")
    assert torch.allclose(found[f"{NAME}.down_proj"], updates[NAME].delta_weight().transpose(1, 2), atol=1e-6)


def test_the_base_shows_that_an_unknown_class_computes_with_out_in() -> None:
    """Only a class that computes with (E, in, out) says is_transposed, so that this one does not."""
    update = stack(H, H, "down_proj")
    straight = {f"{NAME}.gate_up_proj": (EXPERTS, 2 * H, H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    found = change({NAME: update}, straight, model_type="unheard_of")
    assert torch.allclose(found[f"{NAME}.down_proj"], update.delta_weight(), atol=1e-6)
    turned = {f"{NAME}.gate_up_proj": (EXPERTS, H, 2 * H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    with pytest.raises(IncompatibleAdapter, match="--model-type"):
        change({NAME: update}, turned, model_type="unheard_of")


def test_a_checkpoint_that_lies_otherwise_than_its_class() -> None:
    """Qwen3-VL's files have (E, in, out), and transformers 5 turns them as it loads them."""
    update = stack(H, H, "down_proj")
    shapes = {f"{NAME}.gate_up_proj": (EXPERTS, H, 2 * H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    found = change({NAME: update}, shapes, model_type="qwen3_vl_moe")
    assert torch.allclose(found[f"{NAME}.down_proj"], update.delta_weight().transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("inner", [6, H])
@pytest.mark.parametrize("each", [False, True], ids=["stacked", "by_expert"])
def test_experts_without_a_gate_are_wrapped_as_their_class_registers_them(inner: int, each: bool) -> None:
    updates = wrapped([(inner, H), (H, inner)], ["up_proj", "down_proj"])
    sides = {"up_proj": (inner, H), "down_proj": (H, inner)}
    shapes = {f"{NAME}.{name}": (EXPERTS, *of) for name, of in sides.items()}
    if each:
        shapes = {f"{NAME}.{e}.{name}.weight": of for name, of in sides.items() for e in range(EXPERTS)}
    found = change(updates, shapes, model_type="nemotron_h")
    for name, update in (("up_proj", updates[f"{NAME}.base_layer"]), ("down_proj", updates[NAME])):
        for e, delta in enumerate(update.delta_weight()):
            W = found[f"{NAME}.{e}.{name}.weight"] if each else found[f"{NAME}.{name}"][e]
            assert torch.allclose(W, delta, atol=1e-6)


@pytest.mark.parametrize("parameters", list(permutations(["up_proj", "down_proj"])))
def test_an_unknown_class_may_register_in_any_order(parameters: tuple[str, str]) -> None:
    """Where down_proj is I x H as stored and PEFT 0.18 wrote it, only one order fits; square ones fit in both."""
    updates = wrapped([(H, 6), (6, H)], list(parameters), "in_out", True)
    shapes = {f"{NAME}.up_proj": (EXPERTS, 6, H), f"{NAME}.down_proj": (EXPERTS, H, 6)}
    found = change(updates, shapes, model_type="unheard_of")
    inner = updates[f"{NAME}.base_layer"].delta_weight().transpose(1, 2)
    assert torch.allclose(found[f"{NAME}.up_proj"], inner, atol=1e-6)
    square = wrapped([(H, H), (H, H)], list(parameters), "out_in")
    shapes = {f"{NAME}.up_proj": (EXPERTS, H, H), f"{NAME}.down_proj": (EXPERTS, H, H)}
    with pytest.raises(IncompatibleAdapter, match=r"registers down_proj, up_proj; .*--model-type"):
        change(square, shapes, model_type="unheard_of")


def test_what_is_settled_says_all_and_stays() -> None:
    updates = wrapped([(6, H), (H, 6)], ["up_proj", "down_proj"])
    shapes = {f"{NAME}.up_proj": (EXPERTS, 6, H), f"{NAME}.down_proj": (EXPERTS, H, 6)}
    config = {"model_type": "nemotron_h"}
    done, ambiguous = settled(Adapter(updates), Names(shapes), shapes, config)
    assert not ambiguous
    assert all(len(update.readings) == 1 and not update.unsettled for update in done.updates.values())
    again, _ = settled(done, Names(shapes), shapes, config)
    assert {m: dict(u.layout) for m, u in again.updates.items()} == {m: dict(u.layout) for m, u in done.updates.items()}


@pytest.mark.parametrize(("model_type", "stated"), [("qwen3_moe", True), ("gpt_oss", False), ("mixtral", False)])
def test_factors_are_turned_round_for_the_peft_of_today(model_type: str, stated: bool) -> None:
    update = stack(H, 6, "down_proj", stated=stated)
    shapes = {f"{NAME}.down_proj": (EXPERTS, 6, H) if stated else (EXPERTS, H, 6)}
    config = {"model_type": model_type}
    wanted = change({NAME: update}, shapes, **config)
    done = as_peft_has_it(Adapter({NAME: update}), Names(shapes), shapes, config).updates[NAME]
    assert isinstance(done, ExpertsUpdate)
    assert done.transposed is (model_type == "gpt_oss")
    found = change({NAME: done}, shapes, **config)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert (done.A is update.A) == (model_type == "mixtral")
