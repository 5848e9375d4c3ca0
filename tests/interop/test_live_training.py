"""Training with what others provide: Trainer and its checkpoints, gradient checkpointing, DDP, FSDP2, torch.compile."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loratools import live
from loratools.errors import LoraToolsError
from tests.live import ids, net, trained

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def llama(vocabulary: int = 61) -> Any:
    torch.manual_seed(0)
    sides = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sides, vocab_size=vocabulary, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    each = [torch.randint(0, 61, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in each]


class Mixed(live.TrainerMixin, transformers.Trainer):  # type: ignore[misc]
    pass


def trainer(kind: Any, folder: Path, model: Any, steps: int) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=rows())


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_trainer_saves_the_adapter_alone_and_resumes_bit_for_bit(init: live.Init, tmp_path: Path) -> None:
    options: dict[str, Any] = {"targets": ["q_proj", "v_proj"], "rank": 2, "dropout": 0.1, "init": init}
    whole, stopped, resumed = llama(20_000), llama(20_000), llama(20_000)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    finals = []
    for model, folder, steps, resume in (
        (whole, "whole", 8, None),
        (stopped, "part", 4, None),
        (resumed, "part", 8, str(tmp_path / "part" / "checkpoint-4")),
    ):
        lora = live.attach(model, **options)
        trainer(Mixed, tmp_path / folder, model, steps).train(resume_from_checkpoint=resume)
        finals.append([parameter.detach().clone() for parameter in lora.parameters()])
    first, part, second = finals
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, part, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    saved = tmp_path / "whole" / "checkpoint-8"
    size = sum(parameter.numel() * 4 for parameter in llama(20_000).parameters())
    assert (saved / "adapter_model.safetensors").stat().st_size < 0.01 * size
    assert not list(saved.glob("model*"))
    fresh = llama(20_000).eval()
    live.load(fresh, saved)
    x = torch.stack([row["input_ids"] for row in rows(3)])
    assert (fresh(x).logits - whole.eval()(x).logits).abs().max() < 1e-5


def test_a_plain_trainer_does_not_resume_from_untrained_factors(tmp_path: Path) -> None:
    model = llama()
    live.attach(model, targets=["q_proj"], rank=2)
    trainer(transformers.Trainer, tmp_path / "out", model, 4).train()
    again = llama()
    live.attach(again, targets=["q_proj"], rank=2)
    with pytest.raises(LoraToolsError, match="untrained factors"):
        trainer(transformers.Trainer, tmp_path / "out", again, 8).train(str(tmp_path / "out" / "checkpoint-4"))
    again.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(LoraToolsError, match="could go on"):
        trainer(Mixed, tmp_path / "out", again, 8).train(str(tmp_path / "out" / "checkpoint-4"))


def test_save_pretrained_of_an_attached_model_is_the_base(tmp_path: Path) -> None:
    model = llama()
    trained(live.attach(model, targets="all-linear", rank=2))
    model.save_pretrained(tmp_path / "m")
    again, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = llama().state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    x = torch.stack([row["input_ids"] for row in rows(2)])
    gradients = []
    for checkpointing in (False, True):
        model = llama().train()
        lora = trained(live.attach(model, targets=["q_proj", "down_proj"], rank=2, dropout=0.2))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(input_ids=x, labels=x).loss.backward()
        gradients.append([parameter.grad for parameter in lora.parameters()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients_of(model: nn.Module, lora: live.Lora) -> list[torch.Tensor]:
    model(ids()).square().sum().backward()
    grads = [parameter.grad for parameter in lora.parameters()]
    assert all(grad is not None for grad in grads)
    return [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads]


@pytest.mark.usefixtures("one_process")
def test_ddp_reduces_the_gradients_of_the_factors() -> None:
    alone, model = net(torch.float32), net(torch.float32)
    expected = gradients_of(alone, trained(live.attach(alone, targets=["up", "head"], rank=2)))
    trained(live.attach(model, targets=["up", "head"], rank=2))
    wrapped = nn.parallel.DistributedDataParallel(model)
    own = gradients_of(wrapped, live.of(wrapped))
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.usefixtures("one_process")
def test_fsdp2_of_a_model_that_is_made_on_the_meta_device() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    alone, model = net(torch.float32), net(torch.float32).to("meta")
    expected = gradients_of(alone, live.attach(alone, targets=["up", "down"], rank=2))
    lora = live.attach(model, targets=["up", "down"], rank=2)
    for block in model.blocks:
        fully_shard(block["up"])
    fully_shard(model)
    model.to_empty(device="cpu")
    places: dict[str, Any] = model.state_dict()
    weights = net(torch.float32).state_dict().items()
    spread = {name: distribute_tensor(W, places[name].device_mesh, places[name].placements) for name, W in weights}
    model.load_state_dict(spread, assign=True)
    own = gradients_of(model, lora)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    lora.detach()  # FSDP2's own class over the layer's stays
    assert [kind.__name__ for kind in type(model.blocks[0]["up"]).__mro__[:3]] == ["FSDPLinear", "FSDPModule", "Linear"]
    assert torch.equal(model(ids()), net(torch.float32)(ids()))


@pytest.mark.usefixtures("one_process")
def test_fsdp2_shards_the_factors_and_saves_them_whole(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, model = net(torch.float32), net(torch.float32)
    reference = trained(live.attach(alone, targets=["up", "head"], rank=2))
    expected = gradients_of(alone, reference)
    lora = trained(live.attach(model, targets=["up", "head"], rank=2))
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block["up"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = gradients_of(model, live.of(model))
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(own, expected, strict=True))
    ours, theirs = lora.adapter().tensors(), reference.adapter().tensors()
    assert all(torch.equal(lazy.load(), theirs[name].load()) for name, lazy in ours.items())


def test_one_graph_serves_every_switch_among_stacked_adapters() -> None:
    from torch._dynamo.testing import CompileCounter

    model, x = net(torch.float32), ids()
    for number in range(6):
        lora = live.attach(model, targets=["up", "down", "head"], rank=1 + number, name=f"a{number}", seed=number)
    trained(lora)
    expected = []
    with torch.no_grad():
        for number in range(6):
            lora.use(f"a{number}")
            expected.append(model(x))
        lora.compiled(max_rank=6, max_adapters=8)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for turn in range(12):
            lora.use(f"a{turn % 6}")
            assert (compiled(x) - expected[turn % 6]).abs().max() < 1e-5
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_an_adapter_attached_after_compiling_is_seen() -> None:
    torch._dynamo.reset()
    model, x = net(torch.float32), ids()
    compiled = torch.compile(model, backend="eager")
    y = compiled(x)
    lora = trained(live.attach(model, targets=["up"], rank=2))
    changed = compiled(x)
    assert (changed - model(x)).abs().max() < 1e-5 < (changed - y).abs().max()
    model.train()
    compiled(x).sum().backward()
    own = [parameter.grad.clone() for parameter in lora.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    model(x).sum().backward()
    assert all((a - b.grad).abs().max() < 1e-5 for a, b in zip(own, lora.parameters(), strict=True))
    torch._dynamo.reset()


def test_a_deepcopy_trains_by_itself() -> None:
    model = llama()
    live.attach(model, targets=["q_proj"], rank=2)
    other = copy.deepcopy(model)
    x = torch.stack([row["input_ids"] for row in rows(2)])
    other(input_ids=x, labels=x).loss.backward()
    assert all(parameter.grad is None for parameter in live.of(model).parameters())
    assert all(parameter.grad is not None for parameter in live.of(other).parameters())
