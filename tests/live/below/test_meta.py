"""Models without values yet: on the meta device, or lazy; a sentence, or the adapter that the values would have had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loratools import live
from loratools.errors import IncompatibleAdapter, InvalidOption
from tests.live import Net, ids, net, trained

TARGETS = ["up", "embed"]


def emptied(model: Net) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())


def assigned(model: Net) -> None:
    model.load_state_dict(net().state_dict(), assign=True)


@pytest.mark.parametrize("arrive", [emptied, assigned])
def test_factors_attached_on_the_meta_device_have_their_start_when_the_weights_come(
    arrive: Callable[[Net], None],
) -> None:
    expected, model = net(), net().to("meta")
    own, lora = (live.attach(each, rank=2, targets=TARGETS) for each in (expected, model))
    arrive(model)
    for (_, a, _, _), (_, b, _, _) in zip(own.children(), lora.children(), strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
    assert len(lora.parameters()) == 6
    assert (model(ids()) - expected(ids())).abs().max() == 0


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("arrive", [emptied, assigned])
def test_an_adapter_loaded_on_the_meta_device_acts_when_the_weights_come(
    arrive: Callable[[Net], None], trainable: bool, tmp_path: Path
) -> None:
    expected, model = net(), net().to("meta")
    lora = trained(live.attach(expected, rank=2, targets=TARGETS, bias="lora_only"))
    lora.save(tmp_path / "adapter")
    live.load(model, tmp_path / "adapter", trainable=trainable)
    arrive(model)
    assert (model(ids()) - expected(ids())).abs().max() < 1e-6 < expected(ids()).abs().max()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "pissa"}, r"blocks\.0\.up.*meta device.*init='pissa' has to look"),
        ({"init": "olora"}, r"blocks\.0\.up.*meta device.*init='olora' has to look"),
        ({"dora": True}, r"blocks\.0\.up.*meta device.*dora has to look"),
        ({"tokens": [1]}, r"embed: .*meta device"),
        ({"bias": "lora_only"}, r"blocks\.0\.up\.bias.*meta device"),
    ],
)
def test_what_needs_the_values_says_so(options: dict[str, Any], says: str) -> None:
    model = net().to("meta")
    with pytest.raises(IncompatibleAdapter, match=says):
        live.attach(model, targets=["up"], **options)
    assert type(model.blocks[0]["up"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_values_is_neither_saved_nor_merged(tmp_path: Path) -> None:
    model = net()
    lora = live.attach(model, targets=["up"])
    model.to("meta")
    for act in (lambda: lora.save(tmp_path / "adapter"), lora.adapter, lora.merge):
        with pytest.raises(IncompatibleAdapter, match="on the meta device"):
            act()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
def test_lazy_layers_are_to_run_first(targets: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(IncompatibleAdapter, match=r"shape in the model's first forward.*\n  0"):
        live.attach(model, rank=2, targets=targets)
    assert [type(layer) for layer in model] == [nn.LazyLinear, nn.Linear]
    model(torch.ones(2, 3))
    assert live.attach(model, rank=2, targets=targets).adapter().updates["0"].shape == (4, 3)


@pytest.mark.parametrize("targets", ["all-linear", ".*", ["weight"]])
def test_a_layer_alone_is_no_model(targets: Any) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(InvalidOption, match=r"the model is itself a Linear.*\n.*Sequential"):
        live.attach(layer, targets=targets)
    assert type(layer) is nn.Linear
