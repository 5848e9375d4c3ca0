"""What others do to a module with an adapter: parametrize, prune, wrap its forward; the model is whole afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from loratools import live
from loratools.errors import IncompatibleAdapter, LoraToolsError
from tests.live import Net, ids, net, trained


class Twice(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return 2 * W


def twice(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Twice())


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "parametrization": twice,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "older_weight_norm": nn.utils.weight_norm,
    "older_spectral_norm": nn.utils.spectral_norm,
    "pruning": partial(prune.l1_unstructured, name="weight", amount=0.3),
}


def compute(kind: str, model: Net) -> None:
    torch.manual_seed(2)  # spectral norms start from a random vector
    COMPUTED[kind](model.blocks[0]["up"])


def attached(model: Net) -> live.Lora:
    return trained(live.attach(model, rank=2, targets=["up", "down"], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_keeps_its_adapter_and_outlives_it(kind: str, first: bool) -> None:
    plain, model, x = net(), net(), ids()
    compute(kind, plain)
    if first:
        compute(kind, model)
    lora = attached(model)
    if not first:
        compute(kind, model)
    with lora.off():
        assert (model(x) - plain(x)).abs().max() < 1e-12
    up = plain.blocks[0]["up"]
    up(torch.ones(1, 8, dtype=torch.float64))
    own = copy.deepcopy(up) if kind == "parametrization" else up
    (_, piece, _, _) = next(each for each in lora.children() if each[2] == "blocks.0.up")
    h = torch.randn(3, 8, dtype=torch.float64)
    expected = own(h) + piece.scaling * h @ piece.A.T @ piece.B.T
    assert (model.blocks[0]["up"](h) - expected).abs().max() < 1e-12
    y = model(x)
    with pytest.raises(IncompatibleAdapter, match=r"blocks\.0\.up\.weight is made by a parametrization"):
        lora.merge("default")
    assert torch.equal(model(x), y)
    lora.detach()
    assert type(model.blocks[0]["up"]).__mro__[1:] == type(up).__mro__[1:]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model(x) - plain(x)).abs().max() < 1e-12


@pytest.mark.parametrize("first", [True, False])
def test_a_parametrization_is_taken_away_below_an_adapter(first: bool) -> None:
    model, x = net(), ids()
    if first:
        twice(model.blocks[0]["up"])
    lora = attached(model)
    if not first:
        twice(model.blocks[0]["up"])
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    parametrize.remove_parametrizations(model.blocks[0]["up"], "weight")
    assert torch.equal(model(x), y)
    with lora.merged():
        assert (model(x) - y).abs().max() < 1e-12
    lora.detach()
    assert type(model.blocks[0]["up"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def hooked(module: Any) -> None:
    """Wrap a forward as accelerate's hooks do."""
    module._old_forward = module.forward
    module.forward = partial(lambda own, *args: own._old_forward(*args), module)


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_hooks_hold_on_the_module_runs_the_adapter(first: bool) -> None:
    model, expected, x = net(), net(), ids()
    attached(expected)
    if first:
        hooked(model.blocks[0]["up"])
    lora = attached(model)
    if not first:
        hooked(model.blocks[0]["up"])
    assert torch.equal(model(x), expected(x))
    lora.detach()
    assert torch.equal(model(x), net()(x))


def test_a_forward_that_passes_the_class_over_is_refused_untouched() -> None:
    model, x = net(), ids()
    up: Any = model.blocks[0]["up"]
    up.forward = MethodType(lambda own, h: 2 * nn.functional.linear(h, own.weight), up)
    y = model(x)
    with pytest.raises(IncompatibleAdapter, match=r"forward of its own on these modules.*\n  blocks\.0\.up\n"):
        live.attach(model, targets=["up"])
    assert type(up) is nn.Linear
    assert torch.equal(model(x), y)
    assert all(parameter.requires_grad for parameter in model.parameters())


def loaded(model: Net) -> None:
    model.load_state_dict(net(torch.float32, seed=4).state_dict())


@pytest.mark.parametrize("act", [loaded, Net.half, lambda model: prune.l1_unstructured(model.head, "weight", 0.3)])
def test_weights_that_were_changed_while_merged_are_not_restored_to_something_else(act: Callable[[Net], Any]) -> None:
    model = net(torch.float32)
    lora = trained(live.attach(model, rank=2, targets=["up", "head"]))
    lora.merge("default")
    act(model)
    with pytest.raises(LoraToolsError, match=r"changed while default was merged.*\n(  .*\n)*  head\.weight"):
        lora.unmerge()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model.to("cpu").train().requires_grad_(False).eval()])
def test_copies_and_moves_of_a_merged_model_unmerge(copied: Callable[[Net], Net]) -> None:
    model, x = net(torch.float32), ids()
    trained(live.attach(model, rank=2, targets=["up", "head"])).merge("default")
    other = copied(model)
    live.of(other).unmerge()
    live.of(other).detach()
    assert torch.equal(other(x), net(torch.float32)(x))
