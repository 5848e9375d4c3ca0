"""Gradient checkpointing: the repeated forward has the adapters of the first one, or it is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loratools import live
from loratools.errors import LoraToolsError
from tests.live import trained


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = torch.tanh(x)
        return x.sum()


def made(reentrant: bool | None) -> tuple[Checkpointed, live.Lora, Tensor]:
    model = Checkpointed(reentrant).train()
    for name in "ab":
        lora = live.attach(model, rank=2, name=name, dtype=torch.float64)
    trained(lora)
    torch.manual_seed(1)
    return model, lora, torch.randn(2, 4, dtype=torch.float64, requires_grad=True)


@contextmanager
def using(lora: live.Lora, what: Any) -> Iterator[None]:
    with lora.off() if what is None else lora.route(what) if isinstance(what, list) else nullcontext():
        if isinstance(what, str | dict):
            lora.use(what)
        yield


WAYS = ["a", {"a": 0.5, "b": 0.5}, ["a", None], None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", WAYS)
def test_gradients_are_those_without_checkpointing(what: Any, reentrant: bool) -> None:
    gradients = []
    for how in (None, reentrant):
        model, lora, x = made(how)
        lora.use("b")
        with using(lora, what):
            model(x).backward()
        gradients.append([p.grad for p in (*lora.parameters(), x)])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", WAYS)
def test_adapters_that_changed_before_the_backward_are_an_error(what: Any, reentrant: bool) -> None:
    model, lora, x = made(reentrant)
    lora.use("b")
    with using(lora, what):
        loss = model(x)
    lora.use("b")
    with pytest.raises(LoraToolsError, match="repeats a forward in which other adapters acted"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_of_which_one_is_repeated_by_other_adapters(reentrant: bool) -> None:
    model, lora, x = made(reentrant)
    lora.use("a")
    first = model(x)
    lora.use("b")
    with pytest.raises(LoraToolsError, match="repeats a forward"):
        (first + model(x)).backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reference_without_gradients_and_steps_in_turn_are_no_error(reentrant: bool) -> None:
    model, lora, x = made(reentrant)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    for name in ("a", "b", "a"):
        with lora.off(), torch.no_grad():
            reference = model(x)
        lora.use(name)
        for _ in range(2):
            (model(x) - reference).backward()
        optimizer.step()
        optimizer.zero_grad()
    with using(lora, ["a", "b"]):
        loss = model(x)
    with using(lora, ["a", "b"]):  # the same rows in a block of its own
        loss.backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())
