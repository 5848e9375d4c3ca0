"""LoRA on running models of diffusers, a UNet and two transformers: dense W + ΔW judges, PEFT writes the adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loratools import live
from tests.interop import images

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TARGETS: Mapping[str, list[str]] = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv", "conv_shortcut", "time_emb_proj"],
    "flux": ["to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out"],
    "sd3": ["to_q", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "norm1.linear", "proj_out", "pos_embed.proj"],
}
"""Of each model: attention, and convolutions where it has some."""


def sd3() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip


def build(name: str) -> Any:
    return {"unet": images.unet, "flux": images.flux, "sd3": sd3}[name]().double().eval()


def output(name: str, model: Any) -> torch.Tensor:
    def noise(*shape: int) -> torch.Tensor:
        return images.noise(*shape).double()

    if name == "unet":
        result = model(noise(1, 4, 8, 8), 7, noise(1, 5, 32))
    elif name == "flux":
        result = model(
            noise(1, 9, 4), noise(1, 5, 32), noise(1, 32), torch.tensor([0.5]).double(), img_ids=noise(9, 3),
            txt_ids=torch.zeros(5, 3), guidance=torch.tensor([3.5]).double(),
        )  # fmt: skip
    else:
        result = model(noise(1, 4, 8, 8), noise(1, 5, 32), noise(1, 32), torch.tensor([7.0]).double())
    sample: torch.Tensor = result.sample
    return sample


def randomize(tensors: Mapping[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(tensors):
            tensors[name].copy_(torch.randn(tensors[name].shape, generator=generator).double() * 0.2)


def dense(A: torch.Tensor, B: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Return B·A of matrices, or of kernels: the r outputs of A mixed by B of kernel 1, in the shape of W."""
    return (B.flatten(1) @ A.flatten(1)).reshape(W.shape)


def attached(name: str, model: Any) -> Any:
    lora = live.attach(model, rank=3, alpha=6, targets=TARGETS[name], seed=1, dtype=torch.float64)
    pieces = {path: piece for _, piece, path, _ in lora.children()}
    randomize({f"{path}.{role}": getattr(piece, role) for path, piece in pieces.items() for role in ("A", "B")})
    return lora


@pytest.mark.parametrize("name", TARGETS)
def test_attached_factors_act_as_the_dense_sum(name: str) -> None:
    model, other = build(name), build(name)
    before = output(name, model)
    lora = attached(name, model)
    kernels = 0
    for _, piece, path, _ in lora.children():
        weight: Any = other.get_submodule(path).weight
        weight.data += 2.0 * dense(piece.A.data, piece.B.data, weight)
        kernels += weight.dim() == 4 and weight.shape[-1] > 1
    assert bool(kernels) is (name != "flux")
    assert {next(t for t in TARGETS[name] if path.endswith(t)) for path in lora.sites} == set(TARGETS[name])
    expected, y = output(name, other), output(name, model)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()
    lora.check()
    y.square().sum().backward()
    expected.square().sum().backward()
    moved = 0
    for _, piece, path, _ in lora.children():
        W: Any = other.get_submodule(path).weight
        G = torch.zeros_like(W) if W.grad is None else W.grad  # what the last block makes of the text leads nowhere
        for own, wanted in (
            (piece.A, piece.B.flatten(1).T @ G.flatten(1)),
            (piece.B, G.flatten(1) @ piece.A.flatten(1).T),
        ):
            gradient = torch.zeros_like(own) if own.grad is None else own.grad
            assert (gradient.flatten(1) - 2.0 * wanted).abs().max() <= 1e-10 * wanted.abs().max() + 1e-12
            moved += bool(gradient.abs().max() > 0)
    assert moved > len(lora.parameters()) / 2
    assert all(p.grad is None for p in model.state_dict(keep_vars=True).values())
    with lora.merged(), torch.no_grad():
        assert (output(name, model) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_stays_what_it_is_for_others(name: str, tmp_path: Path) -> None:
    plain, model = build(name), build(name)
    base, before = plain.state_dict(), output(name, plain)
    classes = {path: type(module) for path, module in plain.named_modules()}
    lora = attached(name, model)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())
    assert all(isinstance(module, classes[path]) for path, module in model.named_modules() if path in classes)
    model.load_state_dict(base, strict=True)
    model.save_pretrained(tmp_path / "saved")
    reopened = type(plain).from_pretrained(tmp_path / "saved", torch_dtype=torch.float64).eval()
    assert all(torch.equal(tensor, base[key]) for key, tensor in reopened.state_dict().items())
    assert (output(name, reopened) - before).abs().max() <= 1e-12 * before.abs().max()
    twin = copy.deepcopy(model)
    y = output(name, model)
    assert torch.equal(output(name, twin), y)
    live.of(twin).detach()
    assert torch.equal(output(name, twin), before)
    assert torch.equal(output(name, model), y)
    with lora.off():
        assert torch.equal(output(name, model), before)
    lora.detach()
    assert torch.equal(output(name, model), before)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", TARGETS)
def test_what_diffusers_and_peft_saved_computes_the_same(name: str, tmp_path: Path) -> None:
    other, model = build(name), build(name)
    before = output(name, model)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[name])
    other.add_adapter(config)
    other.double()
    randomize({key: tensor for key, tensor in other.named_parameters() if "lora_" in key})
    other.save_lora_adapter(tmp_path / "diffusers")
    expected = output(name, other)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    lora = live.load(model, tmp_path / "diffusers", name="file")
    assert (output(name, model) - expected).abs().max() <= 1e-12 * expected.abs().max()
    # The same adapter out of memory, and as it is saved here and loaded by PEFT.
    lora.add("memory", (peft.get_peft_model_state_dict(other), config))
    lora.use("memory")
    assert (output(name, model) - expected).abs().max() <= 1e-12 * expected.abs().max()
    lora.save(tmp_path / "ours", name="file")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").double().eval()
    assert (output(name, again) - expected).abs().max() <= 1e-12 * expected.abs().max()
    lora.detach()
    assert torch.equal(output(name, model), before)
