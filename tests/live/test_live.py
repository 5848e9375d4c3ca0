"""Attach, save, load, switch and take away, on a plain module; against the dense weights in float64."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratools
from loratools import live
from loratools.adapter.kinds import Update
from loratools.errors import IncompatibleAdapter, InvalidOption, LoraToolsError, UnsupportedAdapter, WrongBase
from loratools.live.fresh.start import Init
from loratools.live.summary import readable
from tests.live import Net, ids, net, trained

EVERY = {"targets": ["up", "down", "embed", "conv", "head"], "dtype": torch.float64}


def dense(lora: live.Lora, name: str, weight: float = 1.0) -> Net:
    """Return a plain copy of the model with W + w·ΔW of an adapter, from the adapter's own values."""
    plain = net()
    adapter = lora.adapter(name)
    for path, update in adapter.updates.items():
        plain.get_submodule(path).weight.data += weight * delta(update)
    return plain


def delta(update: Update) -> torch.Tensor:
    """Return ΔW in float64."""
    factors = update.factored()
    assert factors is not None
    left, right = (factor.double() for factor in factors.load())
    return (factors.scale * left @ right).reshape(update.shape)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_model_computes_as_its_dense_weights_and_is_what_it_was_when_all_is_gone() -> None:
    model, x = net(), ids()
    before, classes, y = state(model), [type(m) for m in model.modules()], model(x)
    lora = trained(live.attach(model, rank=3, alpha=6, **EVERY))
    trained(live.attach(model, rank=2, alpha=2, name="poet", targets=["up"], dtype=torch.float64), 6)
    assert lora.names == ("default", "poet")
    lora.use("default")
    assert (model(x) - dense(lora, "default")(x)).abs().max() < 1e-12 < (model(x) - y).abs().max()
    lora.use({"default": 0.5})
    assert (model(x) - dense(lora, "default", 0.5)(x)).abs().max() < 1e-12
    both = dense(lora, "default", 0.3)
    for path, update in lora.adapter("poet").updates.items():
        both.get_submodule(path).weight.data += 0.7 * delta(update)
    lora.use({"poet": 0.7, "default": 0.3})
    assert (model(x) - both(x)).abs().max() < 1e-12
    with lora.off():
        assert torch.equal(model(x), y)
    lora.use(None)
    assert torch.equal(model(x), y)
    assert state(model).keys() == before.keys()
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora." not in n)
    lora.remove("poet")
    assert lora.names == ("default",)
    lora.detach()
    assert [type(m) for m in model.modules()] == classes
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net().named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    with pytest.raises(LoraToolsError, match="no adapters"):
        live.of(model)


def test_a_saved_adapter_is_sealed_with_the_model_and_comes_back(tmp_path: Path) -> None:
    model, x = net(torch.float32), ids()
    lora = trained(live.attach(model, rank=3, alpha=5, targets=["up", "embed", "conv"], seed=7, rslora=True))
    lora.save(tmp_path / "adapter", base_id="org/net")
    opened = loratools.open_adapter(tmp_path / "adapter")
    assert opened.base is not None
    assert opened.base.id == "org/net"
    assert sorted(opened.base.tensors) == ["blocks.0.up.weight", "blocks.1.up.weight", "conv.weight", "embed.weight"]
    assert opened.provenance[-1].seed == 7
    assert opened.provenance[-1].parameters["targets"] == ["conv", "embed", "up"]
    assert {update.scaling for update in opened.updates.values()} == {5 / 3**0.5}
    again = net(torch.float32)
    other = live.load(again, tmp_path / "adapter", name="poet")
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in other.sites["conv"].lora.parameters())
    with pytest.raises(InvalidOption, match="'poet' already"):
        other.add("poet", tmp_path / "adapter")
    wrong = net(torch.float32)
    bits = wrong.blocks[1]["up"].weight.data.view(torch.int32)
    bits[2, 3] ^= 1
    before = state(wrong)
    with pytest.raises(WrongBase, match="not the base") as error:
        live.load(wrong, tmp_path / "adapter")
    assert error.value.problems == ("blocks.1.up.weight: its bytes are not those of the sealed base",)
    assert all(torch.equal(own, before[name]) for name, own in wrong.state_dict().items())
    assert not any(hasattr(module, "lora") for module in wrong.modules())
    live.load(wrong, tmp_path / "adapter", check_base="warn")
    trainable = live.load(net(torch.float32), tmp_path / "adapter", trainable=True)
    assert len(trainable.parameters()) == 8
    assert torch.equal(trainable.model(x), model(x))


def test_a_float32_copy_of_a_bf16_base_is_accepted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = net(torch.bfloat16)
    trained(live.attach(model, targets=["up"])).save(tmp_path / "a")
    wide = net(torch.bfloat16).float()
    live.load(wide, tmp_path / "a")
    assert "exact copy of the sealed base in another dtype, F32 of BF16" in caplog.text
    live.of(wide).save(tmp_path / "b")
    first, second = (loratools.open_adapter(tmp_path / name).base for name in "ab")
    assert first is not None
    assert second is not None
    assert first.tensors == second.tensors
    inexact = net(torch.float32)
    with pytest.raises(WrongBase):
        live.load(inexact, tmp_path / "a")


def test_an_adapter_without_a_base_hash_is_said(caplog: pytest.LogCaptureFixture) -> None:
    adapter = trained(live.attach(net(torch.float32), targets=["up"], rank=2)).adapter()
    live.load(net(torch.float32), adapter)
    assert "carries no base hash" in caplog.text
    caplog.clear()
    live.load(net(torch.float32), adapter, check_base="off")
    assert not caplog.text


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_torch, copy.deepcopy])
def test_a_copy_has_a_handle_of_its_own(copied: Callable[[nn.Module], Any]) -> None:
    model, x = net(), ids()
    lora = trained(live.attach(model, rank=2, **EVERY))
    y = model(x)
    other = copied(model)
    own = live.of(other)
    assert own is not lora
    assert own.model is other
    assert torch.equal(other(x), y)
    assert isinstance(other.head, nn.Linear)
    own.use(None)
    assert not torch.equal(other(x), y)
    assert torch.equal(model(x), y)
    own.detach()
    assert [type(m) for m in other.modules()] == [type(m) for m in net().modules()]


def test_strict_loading_and_gradients_of_factors_alone() -> None:
    model, x = net(), ids()
    lora = live.attach(model, rank=2, **EVERY)
    model.load_state_dict(net(seed=3).state_dict(), strict=True)
    assert torch.equal(model(x), net(seed=3)(x))
    optimizer = torch.optim.SGD(lora.groups(lr=0.1, ratio=16))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.6]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 14 == len(lora.parameters())
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora." not in n)
    optimizer.step()
    model.eval()
    assert not torch.equal(model(x), net(seed=3)(x))


def test_trained_biases_and_whole_tensors_are_copies(tmp_path: Path) -> None:
    model, x = net(torch.float32), ids()
    y = model(x)
    lora = live.attach(model, rank=2, targets=["up"], bias="all")
    with torch.no_grad():
        for _, child, _, parameter in lora.children():
            if parameter == "bias":
                child.tensor.add_(0.5)
    biased = net(torch.float32)
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.5
    assert (model(x) - biased(x)).abs().max() < 1e-5
    assert sorted(lora.adapter().replacements) == sorted(n for n, _ in net().named_parameters() if n.endswith("bias"))
    lora.save(tmp_path / "a")
    other = net(torch.float32)
    live.load(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))
    with pytest.raises(InvalidOption, match="trained whole is there or is not"):
        live.of(other).use({"default": 0.5})
    with lora.off():
        assert torch.equal(model(x), y)


class Bypass(nn.Module):
    """A module whose weight is read, and which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.ModuleDict({"e": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def test_a_target_that_never_runs_is_found_and_an_idle_one_is_not() -> None:
    model = Bypass()
    lora = live.attach(model, targets=["used", "read", "e"], rank=2)
    with pytest.raises(IncompatibleAdapter, match="1 module") as error:
        model(torch.randn(2, 4))
    assert error.value.problems == ("read",)
    with pytest.raises(IncompatibleAdapter) as error:
        lora.check()
    assert error.value.problems == ("read", "idle.e")
    sound = Bypass()
    live.attach(sound, targets=["used", "e"], rank=2)
    sound(torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore")
def test_fused_fast_paths_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 3, 8)
    lora = trained(live.attach(model, targets=["linear1"], rank=2))
    model.train()
    layer.dropout.p = layer.dropout1.p = layer.dropout2.p = layer.self_attn.dropout = 0.0
    y = model(x)  # in training no fast path is taken
    model.eval()
    with pytest.raises(IncompatibleAdapter, match="did not run"), torch.no_grad():
        model(x)
    lora.detach()
    alone = trained(live.attach(layer, targets=["linear1"], rank=2))
    with torch.no_grad():
        assert (layer(x) - y).abs().max() < 1e-5  # hooks on the layer itself keep it from the fast path
    alone.detach()
    with pytest.raises(IncompatibleAdapter, match="MultiheadAttention"):
        live.attach(nn.MultiheadAttention(8, 2), targets=["out_proj"], rank=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init": "Kaiming"}, "init is 'Kaiming'"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"targets": ["upp"]}, "upp; nearest"),
        ({"targets": "(("}, "no regular expression"),
        ({"targets": []}, "targets is"),
        ({"name": ""}, "name is ''"),
        ({"init": "pissa", "dora": True}, "dora is True"),
    ],
)
def test_options_that_cannot_be_leave_the_model_untouched(options: dict[str, Any], says: str) -> None:
    model = net()
    with pytest.raises(InvalidOption) as error:
        live.attach(model, **options)
    assert says in str(error.value)
    assert not any(hasattr(module, "lora") for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_shape_that_does_not_fit_and_an_unknown_name() -> None:
    small = net(torch.float32)
    adapter = trained(live.attach(small, targets=["up"], rank=2)).adapter()
    torch.manual_seed(0)
    large = Net(16)
    with pytest.raises(IncompatibleAdapter, match="2 problem"):
        live.load(large, adapter)
    assert not any(hasattr(module, "lora") for module in large.modules())
    with pytest.raises(InvalidOption, match="no adapter 'pote' here; there are: default"):
        live.of(small).use("pote")


def test_other_kinds_act_and_cannot_be_trained() -> None:
    from loratools.adapter import kinds
    from loratools.adapter.model import Adapter
    from loratools.storage.lazy import LazyTensor

    torch.manual_seed(2)
    shapes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}
    parts = {name: LazyTensor.of(torch.randn(shape)) for name, shape in shapes.items()}
    update = kinds.get(kinds.claim(parts) or "").build(parts, 0.5, 1.0)
    model, x = net(), ids()
    live.load(model, Adapter({"blocks.0.up": update}))
    plain = net()
    plain.blocks[0]["up"].weight.data += update.delta_weight().double()
    assert (model(x) - plain(x)).abs().max() < 1e-6
    with pytest.raises(UnsupportedAdapter, match="cannot be trained"):
        live.load(net(), Adapter({"blocks.0.up": update}), trainable=True)


def test_what_print_says() -> None:
    model = net(torch.float32)
    lora = live.attach(model, rank=2, targets=["up", "down"])
    base = sum(p.numel() for p in net().parameters())
    assert repr(lora) == f"default: 4 modules, 192 of {base} parameters ({19200 / base:.2f} %), 768 B, trainable"


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_print_says_the_bytes_of_the_file_to_come(init: Init, tmp_path: Path) -> None:
    """PiSSA is saved at twice the rank, an adapter that was loaded as it came, whatever the model's dtype."""
    lora = live.attach(net(torch.float32), rank=2, targets=["up", "down"], init=init)
    lora.save(tmp_path / "a")
    again = live.load(net(torch.bfloat16), tmp_path / "a", check_base="off")
    again.save(tmp_path / "b")
    for handle, folder in ((lora, "a"), (again, "b")):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert f"), {readable(nbytes)}B" in repr(handle)


def test_the_config_that_peft_reads(tmp_path: Path) -> None:
    model = net(torch.float32)
    live.attach(model, rank=2, alpha=3, targets=["up"], dropout=0.1).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    stated = config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]
    assert stated == ("LORA", 2, 3, 0.1)
