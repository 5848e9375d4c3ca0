"""Models that accelerate has put hooks on (device_map, offload) before or after their adapters."""

from __future__ import annotations

import pytest
import torch

from loratools import live
from tests.interop.test_live_training import llama, rows
from tests.live import trained

accelerate = pytest.importorskip("accelerate")

PLACES = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("first", [True, False])
def test_a_dispatched_model_runs_its_adapters(first: bool) -> None:
    x = torch.stack([row["input_ids"] for row in rows(3)])
    expected, model, targets = llama().eval(), llama().eval(), ["q_proj", "embed_tokens", "lm_head"]
    trained(live.attach(expected, targets=targets, rank=2))
    if not first:
        trained(live.attach(model, targets=targets, rank=2))
    accelerate.dispatch_model(model, {**PLACES, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    if first:
        trained(live.attach(model, targets=targets, rank=2))
    assert torch.equal(model(input_ids=x).logits, expected(input_ids=x).logits)
    live.of(model).detach()
    assert torch.equal(model(input_ids=x).logits, llama().eval()(input_ids=x).logits)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(input_ids=x).logits, llama().eval()(input_ids=x).logits)
