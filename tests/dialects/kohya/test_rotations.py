"""`oft_R`, `boft_R` and `oft_unet_…` in one file: merged as sd-scripts' `merge_to` does, by its formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.errors import UnsupportedAdapter
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify

Tensors = dict[str, torch.Tensor]
HEADS = {"linear": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv": "mid_block.resnets.0.conv1"}
SHAPES = {"linear": (8, 12), "conv": (8, 4, 3, 3)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def merged(folder: Path, layer: str, parts: Tensors, header: dict[str, Any], prefix: str, weight: float) -> Any:
    """Merge an adapter of one module into a base of it, check it, and return W and W'."""
    (folder / "base").mkdir()
    W = random(*SHAPES[layer])
    save_file({f"{HEADS[layer]}.weight": W}, folder / "base" / "model.safetensors", {"format": "pt"})
    flat = prefix + HEADS[layer].replace(".", "_") if prefix.endswith("_") else prefix + HEADS[layer]
    path = folder / "adapter.safetensors"
    save_file({f"{flat}.{part}": tensor for part, tensor in parts.items()}, path, header)
    merge(folder / "base", [path], folder / "merged", weights=[weight])
    assert verify(folder / "merged", folder / "base", [path], weights=[weight]).ok
    return W.double(), load_file(next((folder / "merged").glob("*.safetensors")))[f"{HEADS[layer]}.weight"].double()


def rotation(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Return R of each block: I + 2Q + 2Q² + 2Q³ + Q⁴."""
    Q = torch.zeros(len(numbers), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = numbers.double()
    Q = Q - Q.mT
    return torch.eye(size) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


@pytest.mark.parametrize("weight", [1.0, 0.6])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["plain", "scaled", "constrained"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_triangles_rotate_inputs(tmp_path: Path, layer: str, how: str, shared: bool, weight: float) -> None:
    """A kernel is turned the other way round than a matrix, as both trainers do."""
    inputs, size = 12 if layer == "linear" else 36, 4
    numbers = 0.2 * random(1 if shared else inputs // size, 6)
    parts, header = {"oft_R.weight": numbers}, {"ss_network_module": "networks.oft_v2"}
    if how == "scaled":
        parts["oft_R.scaled_oft"] = torch.tensor(True)
        numbers = numbers / (2 * 3**0.5)
    if how == "constrained":
        header["ss_network_args"] = json.dumps({"coft": "True", "coft_eps": "0.05"})
        limit = 0.05 / len(numbers) ** 0.5
        numbers = numbers * (limit / (2**0.5 * numbers.norm(dim=1, keepdim=True))).clamp(max=1)
    W, found = merged(tmp_path, layer, parts, header, "lora_unet_", weight)
    R = rotation(numbers, size).expand(inputs // size, -1, -1)
    R = R if layer == "conv" else R.mT
    turned = torch.einsum("ork,rkc->orc", W.reshape(8, -1, size), R).reshape(W.shape)
    torch.testing.assert_close(found, W + weight * (turned - W), rtol=1e-5, atol=1e-5)


def test_a_butterfly_of_sd_scripts_is_that_of_peft(tmp_path: Path) -> None:
    """With one factor, boft_R is block diagonal: W' = s·W·Rᵀ, R = (I − Q)(I + Q)⁻¹."""
    X, scales = random(1, 3, 4, 4), random(8, 1, seed=3)
    W, found = merged(tmp_path, "linear", {"boft_R": X, "boft_s": scales},
                      {"ss_network_module": "networks.boft"}, "lora_unet_", 1.0)  # fmt: skip
    Q = ((X - X.mT) / 2)[0].double()
    R = (torch.eye(4) - Q) @ torch.linalg.inv(torch.eye(4) + Q)
    turned = torch.einsum("okc,kdc->okd", W.reshape(8, 3, 4), R).reshape(W.shape)
    torch.testing.assert_close(found, scales.double() * turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["oft_unet_", "lora_unet_"])
def test_the_older_network_of_sd_scripts(tmp_path: Path, prefix: str) -> None:
    """Its names begin with `oft_unet_`, and its blocks are LyCORIS' of outputs."""
    X = 0.3 * random(2, 4, 4)
    parts = {"oft_blocks": X, "alpha": torch.tensor(0.01)}
    W, found = merged(tmp_path, "linear", parts, {"ss_network_module": "networks.oft"}, prefix, 1.0)
    Q = (X - X.mT).double()
    Q = Q * min(1.0, 0.01 * 8 / float(Q.norm()))
    R = (torch.eye(4) + Q) @ torch.linalg.inv(torch.eye(4) - Q)
    wanted = torch.einsum("knm,knp->kmp", R, W.reshape(2, 4, -1)).reshape(W.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_a_butterfly_of_lycoris_in_both_namings(tmp_path: Path, prefix: str) -> None:
    """Two stages: pairs of blocks of 4 among 8 outputs; the dense form is in the tests of the kind."""
    path = tmp_path / "adapter.safetensors"
    kohya = f"{prefix}{HEADS['linear'].replace('.', '_')}"
    flat = kohya if prefix.endswith("_") else f"{prefix}double_blocks.0.img_attn.proj"
    save_file({f"{flat}.oft_blocks": random(2, 2, 4, 4), f"{flat}.rescale": random(8, 1),
               f"{flat}.alpha": torch.tensor(0.0)}, path)  # fmt: skip
    (update,) = dialects.open_adapter(path).updates.values()
    assert (update.kind, update.rank, update.alpha, update.shape[0]) == ("boft_output", 4, 0.0, 8)


def test_a_magnitude_beside_a_rotation_is_refused_by_what_it_is(tmp_path: Path) -> None:
    flat = f"lora_unet_{HEADS['linear'].replace('.', '_')}"
    save_file({f"{flat}.oft_R.weight": random(3, 6), f"{flat}.dora_scale": random(8, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedAdapter) as caught:
        dialects.open_adapter(tmp_path / "a.safetensors")
    assert "dora_scale (2-D), oft_R.weight (2-D)" in str(caught.value.problems)
