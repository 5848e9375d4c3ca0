"""Threads, tasks and replicas: a model has one state of what acts, which nobody changes below another's block."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loratools import live
from loratools.errors import LoraToolsError
from tests.live import Net, ids, net, trained


def two() -> live.Lora:
    model = net()
    for name in "ab":
        lora = live.attach(model, rank=2, name=name, targets=["up"], dtype=torch.float64)
    return trained(lora)


ACTS: dict[str, Callable[[live.Lora], Any]] = {
    "use": lambda lora: lora.use("b"),
    "route": lambda lora: lora.route(["b"] * 3).__enter__(),
    "off": lambda lora: lora.off().__enter__(),
    "merge": lambda lora: lora.merge("b"),
    "remove": lambda lora: lora.remove("b"),
    "compiled": lambda lora: lora.compiled(),
    "attach": lambda lora: live.attach(lora.model, name="c", targets=["up"]),
}


@pytest.mark.parametrize("act", ACTS)
def test_another_thread_changes_nothing_inside_a_block(act: str) -> None:
    lora, errors = two(), []
    model = lora.model

    def other() -> None:
        model(ids())  # a thread that only runs the model may do so: a streamer of generate does
        try:
            ACTS[act](lora)
        except LoraToolsError as error:
            errors.append(str(error))

    with lora.route(["a", None, "b"]):
        expected = model(ids())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(model(ids()), expected)
        with lora.off():
            lora.use("b")
        live.of(copy.deepcopy(model)).use("b")
    assert len(errors) == 1
    assert "another thread or task is in a block" in errors[0]
    lora.use("b")


def test_a_task_of_asyncio_changes_nothing_inside_the_block_of_another() -> None:
    lora = two()

    async def serve(names: list[str | None], turn: asyncio.Event, done: asyncio.Event) -> None:
        with lora.route(names):
            turn.set()
            await done.wait()

    async def both() -> None:
        turn, done = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(serve(["a", None, "b"], turn, done))
        await turn.wait()
        with pytest.raises(LoraToolsError, match="another thread or task"):
            await serve(["b", "b", "b"], asyncio.Event(), done)
        done.set()
        await first
        with lora.route(["b", "b", "b"]):
            pass

    asyncio.run(both())


def replicas(model: nn.Module, count: int) -> list[Any]:
    """Copy a model as `torch.nn.parallel.replicate` does, which asks for devices of their own."""
    modules = list(model.modules())
    made = []
    for _ in range(count):
        copies: dict[nn.Module, Any] = {each: each._replicate_for_data_parallel() for each in modules}
        for module, replica in copies.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(replica, name, copies[child])
            for own, held in ((replica._parameters, module._parameters), (replica._buffers, module._buffers)):
                for name, tensor in held.items():
                    if tensor is None:
                        own[name] = None
                    else:
                        setattr(replica, name, tensor.clone())
        made.append(copies[model])
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"dora": True}, {"init": "pissa", "targets": ["up", "head"]}, {"bias": "lora_only"}],
    ids=lambda options: "-".join(options) or "lora",
)
def test_replicas_of_data_parallel_have_factors_of_their_own(options: dict[str, Any]) -> None:
    model: Net = net().train()
    more = {"targets": ["up", "embed", "conv"], "rank": 2, "dtype": torch.float64} | options
    lora = trained(live.attach(model, **more))
    y = model(ids())
    (2 * y).square().sum().backward()
    expected = [parameter.grad for parameter in lora.parameters()]
    model.zero_grad()
    outputs = []
    for replica in replicas(model, 2):
        piece = replica.blocks[0]["up"].lora.pieces["default"][0]
        assert piece is not model.blocks[0]["up"].lora.pieces["default"][0]
        outputs.append(replica(ids()))
        assert torch.equal(outputs[-1], y)
    (outputs[0] + outputs[1]).square().sum().backward()
    for parameter, grad in zip(lora.parameters(), expected, strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert (parameter.grad - grad).abs().max() < 1e-10 * (1 + grad.abs().max())
    with lora.route(["default"] * 6):
        for replica in replicas(model, 2):
            with pytest.raises(LoraToolsError, match="the batch has 6 rows"):
                replica(ids())
