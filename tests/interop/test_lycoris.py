"""Every kind of LyCORIS against its own `forward()`: the layer with the merged weight computes what the module does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loratools import dialects
from loratools.format.digest import adapter_digest
from loratools.format.registry import KINDS
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from loratools.surgery.validate import validate
from loratools.surgery.verify import verify
from tests.surgery.models import load

lycoris = pytest.importorskip("lycoris.modules")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")]


def linear() -> nn.Module:
    return nn.Linear(24, 36)


def square() -> nn.Module:
    return nn.Linear(24, 24)


def conv() -> nn.Module:
    return nn.Conv2d(12, 18, 3, padding=1)


def pointwise() -> nn.Module:
    return nn.Conv2d(12, 18, 1)


def conv1d() -> nn.Module:
    return nn.Conv1d(12, 18, 3)


def layernorm() -> nn.Module:
    return nn.LayerNorm(24)


LAYERS = (linear, square, conv, pointwise, conv1d)
CASES: list[tuple[str, Callable[[], nn.Module], str, dict[str, Any]]] = [
    *((f"{kind}-{layer.__name__}-{name}", layer, module, options)
      for layer in LAYERS
      for kind, module, name, options in (
          ("loha", "LohaModule", "plain", {}),
          ("loha", "LohaModule", "wd-out", {"weight_decompose": True}),
          ("loha", "LohaModule", "wd-in", {"weight_decompose": True, "wd_on_out": False}),
          ("lokr", "LokrModule", "plain", {}),
          ("lokr", "LokrModule", "factored", {"decompose_both": True, "factor": 3, "lora_dim": 1}),
          ("lokr", "LokrModule", "whole", {"full_matrix": True}),
          ("lokr", "LokrModule", "wd-in", {"weight_decompose": True, "wd_on_out": False}),
          ("locon", "LoConModule", "plain", {}),
          ("locon", "LoConModule", "rs", {"rs_lora": True}),
          ("locon", "LoConModule", "wd-out", {"weight_decompose": True}),
          ("locon", "LoConModule", "wd-in", {"weight_decompose": True, "wd_on_out": False}),
          ("glora", "GLoRAModule", "plain", {}),
          ("full", "FullModule", "plain", {}),
          ("ia3", "IA3Module", "out", {}),
          ("ia3", "IA3Module", "in", {"train_on_input": True}),
          ("oft", "DiagOFTModule", "plain", {}),
          ("oft", "DiagOFTModule", "rescaled", {"rescaled": True}),
          ("oft", "DiagOFTModule", "constrained", {"constraint": 0.02}),
      )),
    *((f"{kind}-tucker-{layer.__name__}", layer, module, {"use_tucker": True})
      for layer in (conv, conv1d)
      for kind, module in (("loha", "LohaModule"), ("lokr", "LokrModule"), ("locon", "LoConModule"))),
    ("norm-layernorm", layernorm, "NormModule", {}),
]  # fmt: skip
UNSEALED = [  # of a kind that the format does not register
    (f"boft-{layer.__name__}-{name}", layer, "ButterflyOFTModule", {"lora_dim": 18} | options)
    for layer in LAYERS
    for name, options in (
        ("plain", {}), ("rescaled", {"rescaled": True}), ("constrained", {"constraint": 0.02}),
        ("stages", {"lora_dim": 6, "rescaled": True}),
    )
    if name != "stages" or layer is square
]  # fmt: skip


def module_of(layer: nn.Module, name: str, options: dict[str, Any], multiplier: float, seed: int = 3) -> nn.Module:
    """Return a LyCORIS module around a layer, with random numbers in all its parameters."""
    classes = {}
    for package in ("loha", "lokr", "locon", "glora", "full", "ia3", "diag_oft", "boft", "norms"):
        classes |= vars(__import__(f"lycoris.modules.{package}", fromlist=["x"]))
    arguments = {"lora_dim": 4, "alpha": 3, "bypass_mode": False} | options
    made: nn.Module = classes[name]("lora_unet_block_part", layer, multiplier, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in made.named_parameters():
        if "org" not in key and "dora_scale" not in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        elif "dora_scale" in key:
            parameter.data = parameter.data * (1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return made.eval()


@pytest.mark.sweep(140)
@pytest.mark.parametrize("multiplier", [1.0, -0.6])
@pytest.mark.parametrize("case", CASES + UNSEALED, ids=lambda case: case[0])
def test_the_merged_layer_computes_what_forward_does(case: Any, multiplier: float, tmp_path: Path) -> None:
    kind, make, name, options = case
    if multiplier != 1 and name == "LoConModule" and options == {"weight_decompose": True}:
        multiplier = 1.0  # read as PEFT's DoRA, where a weight acts on s, not on the factors
    torch.manual_seed(1)
    layer = make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    weights = {f"block.part.{key}": W.detach().clone() for key, W in layer.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    module = module_of(layer, name, options, multiplier)
    if name == "FullModule":  # it holds the whole weight once it is applied
        module.apply_to()
    stored = {key: W.detach().clone().contiguous() for key, W in module.state_dict().items() if "org_module" not in key}
    save_file({f"lora_unet_block_part.{key}": W for key, W in stored.items()}, tmp_path / "adapter.safetensors")
    adapter = dialects.open_adapter(tmp_path / "adapter.safetensors", base=Checkpoint.open(tmp_path / "base"))
    sides = weights["block.part.weight"].shape
    inputs = torch.randn(2, sides[1] if len(sides) > 1 else sides[0], *(7,) * (len(sides) - 2))
    report = merge(tmp_path / "base", [adapter], tmp_path / "merged", weights=[multiplier], keep_residual=True)
    with torch.no_grad():
        wanted, ours = module(inputs), layer_with(load(tmp_path / "merged"), make)(inputs)
        before = layer_with(weights, make)(inputs)
    assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((before - wanted).abs().max()) > 1e-3
    assert report.consumed[0].applied == report.consumed[0].tensors == len(adapter.tensors())
    assert verify(tmp_path / "merged", tmp_path / "base", [adapter], weights=[multiplier]).ok, kind
    assert unmerge(tmp_path / "merged", [adapter], tmp_path / "back").proved == "root hash"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_sealed_it_is_the_same_adapter(case: Any, tmp_path: Path) -> None:
    """Every kind is sealed and read back bit for bit, merges to the same bytes, and PEFT refuses what it has not."""
    _, make, name, options = case
    torch.manual_seed(1)
    layer = make().eval()
    (tmp_path / "base").mkdir()
    weights = {f"block.part.{key}": W.detach().clone() for key, W in layer.state_dict().items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    module = module_of(layer, name, options, 1.0)
    if name == "FullModule":
        module.apply_to()
    stored = {key: W.detach().clone().contiguous() for key, W in module.state_dict().items() if "org_module" not in key}
    save_file({f"lora_unet_block_part.{key}": W for key, W in stored.items()}, tmp_path / "adapter.safetensors")
    base = Checkpoint.open(tmp_path / "base")
    adapter = dialects.open_adapter(tmp_path / "adapter.safetensors", base=base)
    merge(base, [adapter], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for target in ("sealed", "sealed.safetensors"):
        sealed = tmp_path / target
        written = convert(tmp_path / "adapter.safetensors", sealed, base=base)
        assert written.digest == adapter_digest(adapter)
        assert validate(sealed, base).valid
        again = dialects.open_adapter(sealed)
        assert again.updates.keys() == adapter.updates.keys()
        for path, update in adapter.updates.items():
            twin = again.updates[path]
            assert (twin.kind, twin.rank, twin.scaling, twin.alpha) == (
                update.kind, update.rank, update.scaling, update.alpha,
            )  # fmt: skip
            assert twin.parts.keys() == update.parts.keys()
            assert all(torch.equal(twin.parts[part].load(), update.parts[part].load()) for part in update.parts)
            assert [twin.parts[part].dtype for part in update.parts] == [lazy.dtype for lazy in update.parts.values()]
        merge(base, [sealed], tmp_path / f"{target}-merged")
        of_sealed = load(tmp_path / f"{target}-merged")
        assert of_sealed.keys() == merged.keys()
        assert all(torch.equal(merged[tensor], of_sealed[tensor]) for tensor in merged)
        if sealed.is_dir() and not all(KINDS[update.kind].peft for update in adapter.updates.values()):
            with pytest.raises((KeyError, ValueError), match="LORATOOLS"):
                peft.PeftConfig.from_pretrained(str(sealed))


def layer_with(weights: dict[str, Tensor], make: Callable[[], nn.Module]) -> nn.Module:
    layer = make().eval()
    layer.load_state_dict({key.removeprefix("block.part."): W for key, W in weights.items()})
    return layer
