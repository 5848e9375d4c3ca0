"""Where experts land, by hand: every layout, and an error that names what decides where there are two answers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from loratools.adapter.kinds.experts import ExpertsUpdate
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import resolve
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.surgery.models import random

EXPERTS, RANK = 3, 2


def stack(out: int, inner: int, parameter: str, transposed: bool | None = None) -> ExpertsUpdate:
    A, B = random(EXPERTS * RANK, inner, seed=1), random(out, RANK * EXPERTS, seed=2)
    return ExpertsUpdate(LazyTensor.of(A), LazyTensor.of(B), 1.5, 3.0, EXPERTS, parameter, transposed)


def single(out: int, inner: int, seed: int = 0) -> LoraUpdate:
    A, B = random(RANK, inner, seed=seed), random(out, RANK, seed=seed + 50)
    return LoraUpdate(LazyTensor.of(A), LazyTensor.of(B), 1.5, 3.0)


def change(updates: dict[str, object], shapes: dict[str, tuple[int, ...]], **config: object) -> dict[str, Tensor]:
    """Return what an adapter adds to tensors of zeros."""
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for placement in resolve(Adapter(updates), shapes, config):  # type: ignore[arg-type]
        site = placement.site
        W = found[site.tensor].view(site.matrix)[slice(*site.rows), slice(*site.columns)]
        term = placement.update.term(site, 1.0, torch.float32, torch.device("cpu"))
        term.apply_rows(W, slice(0, site.shape[0]), None)
    return found


def test_delta_is_expert_major_in_A_and_minor_in_B() -> None:
    update = stack(6, 4, "down_proj")
    A, B = update.A.load(), update.B.load()
    wanted = torch.zeros(EXPERTS, 6, 4)
    for e in range(EXPERTS):
        for q in range(RANK):
            wanted[e] += 1.5 * torch.outer(B[:, q * EXPERTS + e], A[e * RANK + q])
    assert torch.allclose(update.delta_weight(), wanted, atol=1e-6)
    name = "m.layers.0.mlp.experts"
    straight = change({name: update}, {f"{name}.down_proj": (EXPERTS, 6, 4)})[f"{name}.down_proj"]
    turned = change({name: update}, {f"{name}.down_proj": (EXPERTS, 4, 6)})[f"{name}.down_proj"]
    assert torch.allclose(straight, wanted, atol=1e-6)
    assert torch.allclose(turned, wanted.transpose(1, 2), atol=1e-6)


def test_a_stack_on_experts_of_their_own() -> None:
    update, name = stack(8, 5, "gate_up_proj"), "model.layers.0.mlp.experts"
    delta = update.delta_weight()
    for prefix, first, second in (("mlp", "gate_proj", "up_proj"), ("block_sparse_moe", "w1", "w3")):
        place = f"model.layers.0.{prefix}.experts"
        shapes = {f"{place}.{e}.{part}.weight": (4, 5) for e in range(EXPERTS) for part in (first, second)}
        found = change({name: update}, shapes)
        for e in range(EXPERTS):
            assert torch.allclose(found[f"{place}.{e}.{first}.weight"], delta[e, :4], atol=1e-6)
            assert torch.allclose(found[f"{place}.{e}.{second}.weight"], delta[e, 4:], atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4"])
def test_single_experts_in_a_stack(model_type: str) -> None:
    """Side by side in rows, in turn in columns, side by side in columns."""
    name = "model.layers.0.mlp.experts"
    gate, up = single(4, 5, 1), single(4, 5, 2)
    shape = (EXPERTS, 8, 5) if model_type == "qwen3_moe" else (EXPERTS, 5, 8)
    updates = {f"{name}.1.gate_proj": gate, f"{name}.2.up_proj": up}
    found = change(updates, {f"{name}.gate_up_proj": shape}, model_type=model_type)[f"{name}.gate_up_proj"]
    wanted = torch.zeros(shape)
    if model_type == "qwen3_moe":
        wanted[1, :4], wanted[2, 4:] = gate.delta_weight(), up.delta_weight()
    elif model_type == "gpt_oss":
        wanted[1, :, 0::2], wanted[2, :, 1::2] = gate.delta_weight().T, up.delta_weight().T
    else:
        wanted[1, :, :4], wanted[2, :, 4:] = gate.delta_weight().T, up.delta_weight().T
    assert torch.allclose(found, wanted, atol=1e-6)


def test_an_old_stack_on_experts_of_their_own() -> None:
    """PEFT 0.18 took gate_up_proj (E, 2I, H) for (E, in, out): its change is the transpose, whose rows are gate's."""
    update, name = stack(4, 8, "gate_up_proj", True), "m.experts"
    shapes = {f"{name}.{e}.{part}_proj.weight": (4, 4) for e in range(EXPERTS) for part in ("gate", "up")}
    found, delta = change({name: update}, shapes), update.delta_weight().transpose(1, 2)
    for e in range(EXPERTS):
        assert torch.allclose(found[f"{name}.{e}.gate_proj.weight"], delta[e, :4], atol=1e-6)
        assert torch.allclose(found[f"{name}.{e}.up_proj.weight"], delta[e, 4:], atol=1e-6)


@pytest.mark.parametrize("place", ["mlp", "block_sparse_moe"])
def test_in_switch_layers_of_mlx(place: str) -> None:
    """mlx-lm stacks each projection by itself, under its own names: single experts, and stacks of gate and up."""
    name, switch = "model.layers.0.mlp.experts", f"model.layers.0.{place}.switch_mlp"
    sides = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    shapes = {f"{switch}.{part}.weight": (EXPERTS, *each) for part, each in sides.items()}
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if place == "block_sparse_moe" else {}
    for part, (out, inner) in sides.items():
        update = single(out, inner)
        path = f"model.layers.0.{place}.experts.2.{names.get(part, part)}"
        found = change({path: update}, shapes)[f"{switch}.{part}.weight"]
        assert torch.allclose(found[2], update.delta_weight(), atol=1e-6)
        assert not found[:2].any()
    both = stack(8, 5, "gate_up_proj")
    found, delta = change({name: both}, shapes), both.delta_weight()
    assert torch.allclose(found[f"{switch}.gate_proj.weight"], delta[:, :4], atol=1e-6)
    assert torch.allclose(found[f"{switch}.up_proj.weight"], delta[:, 4:], atol=1e-6)
    with pytest.raises(IncompatibleAdapter, match=f"has {EXPERTS} experts"):
        change({f"{name}.{EXPERTS}.up_proj": single(4, 5)}, shapes)
    with pytest.raises(IncompatibleAdapter, match=r"has \(4, 5\) for each expert"):
        change({f"{name}.0.up_proj": single(5, 4)}, shapes)


@pytest.mark.parametrize("square", [False, True])
def test_single_experts_of_an_unknown_model_lie_as_the_stack_beside_shows(square: bool) -> None:
    """down_proj (E, I, H) of a square expert: gate_up_proj (E, H, 2I) shows that the model stores (in, out)."""
    H, inner, name = 4, 4 if square else 6, "m.experts"
    shapes = {f"{name}.gate_up_proj": (EXPERTS, H, 2 * inner), f"{name}.down_proj": (EXPERTS, inner, H)}
    update = single(H, inner)
    found = change({f"{name}.1.down_proj": update}, shapes, model_type="unheard_of")[f"{name}.down_proj"]
    assert torch.allclose(found[1], update.delta_weight().T, atol=1e-6)
    with pytest.raises(IncompatibleAdapter, match="--model-type"):
        change({f"{name}.1.gate_proj": single(inner, H)}, shapes, model_type="unheard_of")


def test_square_experts_need_the_model_type() -> None:
    update, name = stack(4, 4, "down_proj"), "m.experts"
    shapes = {f"{name}.down_proj": (EXPERTS, 4, 4)}
    for config in ({}, {"model_type": "unheard_of"}):
        with pytest.raises(IncompatibleAdapter, match="--model-type"):
            change({name: update}, shapes, **config)
    delta = update.delta_weight()
    straight = change({name: update}, shapes, model_type="qwen3_moe")[f"{name}.down_proj"]
    turned = change({name: update}, shapes, model_type="gpt_oss")[f"{name}.down_proj"]
    assert torch.allclose(straight, delta, atol=1e-6)
    assert torch.allclose(turned, delta.transpose(1, 2), atol=1e-6)
    said = stack(4, 4, "down_proj", transposed=True)
    found = change({name: said}, shapes, model_type="qwen3_moe")[f"{name}.down_proj"]
    assert torch.allclose(found, delta.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("updates", "shapes", "said"),
    [
        ({"m.experts": stack(6, 4, "down_proj")}, {"m.experts.down_proj": (4, 6, 4)}, "for 3 experts"),
        ({"m.experts": stack(6, 4, "down_proj")}, {"m.experts.down_proj": (3, 6, 5)}, "has shape (6, 4)"),
        ({"m.experts": stack(6, 4, "down_proj")}, {"m.other": (3, 6)}, "neither stacked nor one by one"),
        ({"m.experts": stack(6, 4, "down_proj")}, {"m.experts.0.down_proj.weight": (6, 5)}, "has shape (6, 4)"),
        ({"m.experts.5.w2": single(6, 4)}, {"m.experts.down_proj": (3, 6, 4)}, "has 3 experts"),
        ({"m.experts.0.w1": single(6, 4)}, {"m.experts.gate_up_proj": (3, 4, 12)}, "--model-type"),
        ({"m.experts.0.w1": single(6, 12)}, {"m.experts.gate_up_proj": (3, 12, 12)}, "--model-type"),
        ({"m.experts": stack(4, 8, "down_proj", True)}, {"m.experts.down_proj": (3, 4, 8)}, "stored (in, out)"),
    ],
)
def test_what_does_not_fit_is_refused(
    updates: dict[str, object], shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(IncompatibleAdapter, match=re.escape(said)):
        change(updates, shapes)


def test_factors_that_are_no_stack_are_refused() -> None:
    A, B = LazyTensor.of(random(6, 4)), LazyTensor.of(random(5, 6))
    with pytest.raises(ValueError, match="same rank"):
        ExpertsUpdate(A, B, 1.0, 1.0, 4, "down_proj")
    with pytest.raises(ValueError, match="do not share"):
        ExpertsUpdate(A, LazyTensor.of(random(5, 4)), 1.0, 1.0, 3, "down_proj")


@pytest.mark.parametrize("inner", [5, 4])
def test_experts_one_by_one_of_gpt_oss_and_its_stack(inner: int) -> None:
    """In 4 bits each expert is a linear layer, `down_projs.2`; published weights are stacked (E, in, out)."""
    name, config = "model.layers.0.mlp.experts", {"model_type": "gpt_oss"}
    up, down, router = single(2 * inner, 4, 1), single(4, inner, 2), single(EXPERTS, 4, 3)
    updates = {f"{name}.gate_up_projs.1": up, f"{name}.down_projs.2": down, "model.layers.0.mlp.router.linear": router}
    shapes = {f"{name}.gate_up_proj": (EXPERTS, 4, 2 * inner), f"{name}.down_proj": (EXPERTS, inner, 4)}
    found = change(updates, {**shapes, "model.layers.0.mlp.router.weight": (EXPERTS, 4)}, **config)
    wanted = {tensor: torch.zeros(shape) for tensor, shape in shapes.items()}
    wanted[f"{name}.gate_up_proj"][1] = up.delta_weight().T
    wanted[f"{name}.down_proj"][2] = down.delta_weight().T
    assert all(torch.allclose(found[tensor], W, atol=1e-6) for tensor, W in wanted.items())
    assert torch.allclose(found["model.layers.0.mlp.router.weight"], router.delta_weight(), atol=1e-6)
    with pytest.raises(IncompatibleAdapter, match="3 experts"):
        change({f"{name}.down_projs.3": down}, shapes, **config)


@pytest.mark.parametrize("inner", [5, 4])
def test_a_stack_on_linear_layers_of_gpt_oss(inner: int) -> None:
    name = "model.layers.0.mlp.experts"
    # PEFT has factors of what the class computes with, (E, in, out): of the transpose of a linear layer's weight.
    up, down = stack(4, 2 * inner, "gate_up_proj"), stack(inner, 4, "down_proj")
    shapes = {f"{name}.gate_up_projs.{e}.weight": (2 * inner, 4) for e in range(EXPERTS)}
    shapes |= {f"{name}.down_projs.{e}.weight": (4, inner) for e in range(EXPERTS)}
    turned = {f"{name}.base_layer": up.turned_round(), name: down.turned_round()}
    for updates in (turned, {f"{name}.base_layer": up, name: down}):
        found = change(updates, shapes, model_type="gpt_oss")
        for e in range(EXPERTS):
            for parameter, update in (("gate_up_projs", up), ("down_projs", down)):
                delta = update.delta_weight()[e].T
                assert torch.allclose(found[f"{name}.{parameter}.{e}.weight"], delta, atol=1e-6)
