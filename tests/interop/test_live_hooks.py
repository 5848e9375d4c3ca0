"""accelerate: hooks (device_map, offload) before or after the adapters, and its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import live
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.live.below import checkpoints
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


def test_an_offloaded_model_trains_is_sealed_and_compared(tmp_path: Path) -> None:
    x = torch.stack([row["input_ids"] for row in rows(3)])
    gradients, logits = [], []
    for offload in (False, True):
        model = llama()
        if offload:
            accelerate.cpu_offload(model, execution_device="cpu")
            assert model.lm_head.weight.is_meta
        lora = trained(live.attach(model, targets=["q_proj", "embed_tokens"], rank=2))
        model(input_ids=x, labels=x).loss.backward()
        gradients.append([parameter.grad for parameter in lora.parameters()])
        logits.append(model(input_ids=x).logits)
        lora.save(tmp_path / str(offload))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(*logits)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes() for name in names)
    with pytest.raises(IncompatibleAdapter, match="meta device"):
        lora.merge()
    live.load(model, tmp_path / "False", name="again")
    assert (model(input_ids=x).logits - logits[0]).abs().max() < 1e-5
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1
    accelerate.cpu_offload(other, execution_device="cpu")
    with pytest.raises(WrongBase, match="embed_tokens"):
        live.load(other, tmp_path / "False")


def test_checkpoints_of_the_base_alone_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for said in (checkpoints._say_saved, checkpoints._say_resumed):
        said.cache_clear()
    model = llama()
    lora = trained(live.attach(model, targets=["q_proj"], rank=2))
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = accelerator.prepare(model, torch.optim.SGD(lora.parameters(), lr=0.1))
    accelerator.save_state(tmp_path / "state")
    (text,) = [record.getMessage() for record in caplog.records if "base alone" in record.getMessage()]
    assert "checkpoint of accelerate.accelerator" in text
    assert "lora.save" in text
    caplog.clear()
    accelerator.load_state(tmp_path / "state")
    (text,) = [record.getMessage() for record in caplog.records if "base alone" in record.getMessage()]
    assert "factors stay as they are now" in text
    caplog.clear()
    model.state_dict()  # of whom nobody makes a checkpoint
    model.save_pretrained(tmp_path / "base")
    assert not caplog.records
