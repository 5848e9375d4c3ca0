"""Two models in one file each: what separates them becomes a file that programs for image models load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import dialects
from loratools.adapter.naming.image import families
from loratools.adapter.naming.selection import Selection
from loratools.errors import OutputRefused
from loratools.format.digest import checked_digest
from loratools.surgery.extract import Extraction, extract
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import merge
from tests.surgery.models import random

_CLIP = "conditioner.embedders.0.transformer.text_model.encoder.layers.0"
_OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0"
_NORM = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
_VAE = "first_stage_model.decoder.conv_in.weight"
_IN_PROJ, _IN_BIAS = f"{_OPEN_CLIP}.attn.in_proj_weight", f"{_OPEN_CLIP}.attn.in_proj_bias"
_TE2 = "lora_te2_text_model_encoder_layers_0_self_attn_"


def sdxl() -> dict[str, Tensor]:
    """Weights of SDXL's names: UNet, both text encoders, VAE."""
    names = [name.replace("{}", "0") for name in families.get("sdxl").original]
    weights = {f"model.diffusion_model.{name}.weight": random(16, 16, seed=i) for i, name in enumerate(names)}
    return weights | {
        _NORM: random(16), _VAE: random(2, 2), _IN_PROJ: random(48, 16),
        f"{_CLIP}.self_attn.q_proj.weight": random(16, 16), f"{_CLIP}.layer_norm1.bias": random(16),
        f"{_OPEN_CLIP}.mlp.c_fc.weight": random(32, 16), _IN_BIAS: random(48), f"{_OPEN_CLIP}.ln_1.weight": random(16),
        f"{_OPEN_CLIP}.ln_1.bias": random(16),
    }  # fmt: skip


def flux() -> dict[str, Tensor]:
    """Weights of Flux' names, with nothing before them."""
    names = [name.replace("{}", "0") for name in families.get("flux").original]
    weights = {f"{name}.weight": random(16, 16, seed=i) for i, name in enumerate(names)}
    return weights | {"double_blocks.0.img_attn.norm.query_norm.scale": random(16), "img_in.bias": random(16)}


def language() -> dict[str, Tensor]:
    """Weights of a language model."""
    return {f"model.layers.{i}.self_attn.q_proj.weight": random(16, 16, seed=i) for i in range(2)}


def tuned(weights: dict[str, Tensor], *changed: str) -> dict[str, Tensor]:
    """Return other weights: matrices differ by rank 2, and those `changed` by 1; other vectors, and VAE, not at all."""

    def change(name: str, W: Tensor, seed: int) -> Tensor:
        if name in changed:
            return W + 1
        if W.ndim < 2 or name in (_VAE, _IN_PROJ):
            return W
        return W + 0.1 * random(W.shape[0], 2, seed=seed) @ random(2, W.shape[1], seed=seed + 1)

    return {name: change(name, W, 1000 + 2 * i) for i, (name, W) in enumerate(weights.items())}


def run(folder: Path, weights: dict[str, Tensor], changed: dict[str, Tensor], **says: str) -> Extraction:
    """Extract into out.safetensors, and see that base + adapter is the fine-tune, and the digest that of the file."""
    save_file(weights, folder / "base.safetensors", says)
    save_file(changed, folder / "tuned.safetensors")
    extraction = extract(folder / "base.safetensors", folder / "tuned.safetensors", folder / "out.safetensors", 2)
    assert {path.name for path in folder.iterdir()} == {"base.safetensors", "tuned.safetensors", "out.safetensors"}
    adapter = dialects.open_adapter(folder / "out.safetensors")
    assert extraction.digest == checked_digest(adapter, "out")
    lacks = any("holds no base hash" in note for note in extraction.notes)
    with safe_open(folder / "out.safetensors", "pt") as file:
        assert (extraction.base in json.dumps(file.metadata())) != lacks
    assert (adapter.base.root if adapter.base else None) == (None if lacks else extraction.base)
    assert lacks == (adapter.dialect != "loratools")
    merge(folder / "base.safetensors", folder / "out.safetensors", folder / "again.safetensors")
    again = load_file(folder / "again.safetensors")
    for name, W in changed.items():
        torch.testing.assert_close(again[name], W, rtol=1e-5, atol=1e-5)
    return extraction


def test_factors_alone_are_kohyas(tmp_path: Path) -> None:
    weights = sdxl()
    extraction = run(tmp_path, weights, tuned(weights), **{"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    assert "written in the layout of kohya, which ComfyUI loads" in extraction.notes
    written = load_file(tmp_path / "out.safetensors")
    assert "lora_unet_input_blocks_0_0.lora_down.weight" in written
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in written
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in written
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        says = file.metadata()
    assert says["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (says["ss_network_dim"], says["ss_network_alpha"], says["modelspec.title"]) == ("2", "2.0", "out")


@pytest.mark.parametrize(
    ("changed", "dialect", "names"),
    [
        ([_NORM], "kohya", ["lora_unet_input_blocks_1_0_in_layers_0.diff"]),
        ([f"{_CLIP}.layer_norm1.bias"], "comfy",
         ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1.diff_b"]),
        ([_IN_BIAS], "comfy",
         [f"text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.{x}_proj.diff_b" for x in "qkv"]),
        ([f"{_OPEN_CLIP}.ln_1.weight", f"{_OPEN_CLIP}.ln_1.bias"], "comfy",
         [f"text_encoders.clip_g.transformer.text_model.encoder.layers.0.layer_norm1.{x}" for x in ("diff", "diff_b")]),
    ],
)  # fmt: skip
def test_what_is_whole_becomes_a_difference(tmp_path: Path, changed: list[str], dialect: str, names: list[str]) -> None:
    weights = sdxl()
    extraction = run(tmp_path, weights, tuned(weights, *changed))
    assert f"written in the layout of {dialect}, which ComfyUI loads" in extraction.notes
    assert load_file(tmp_path / "out.safetensors").keys() >= set(names)


def of_second_encoder(weights: dict[str, Tensor], *, bias: float = 0.0) -> dict[str, Tensor]:
    """Return weights of which q, k and v of OpenCLIP differ by rank 2 each, and the biases by `bias`."""
    low = torch.cat([0.1 * random(16, 2, seed=i) @ random(2, 16, seed=i + 9) for i in range(3)])
    return weights | {_IN_PROJ: weights[_IN_PROJ] + low, _IN_BIAS: weights[_IN_BIAS] + bias}


def test_the_second_encoders_projections_are_factored_one_by_one(tmp_path: Path) -> None:
    """sd-scripts and ComfyUI know q_proj, k_proj and v_proj; rank 2 each is 6 of the fused weight."""
    weights = sdxl()
    changed = of_second_encoder(tuned(weights))
    extraction = run(tmp_path, weights, changed)
    assert "written in the layout of kohya, which ComfyUI loads" in extraction.notes
    assert extraction.base == hash_checkpoint(tmp_path / "base.safetensors").root
    assert extraction.tuned == hash_checkpoint(tmp_path / "tuned.safetensors").root
    assert not extraction.of("whole")
    assert extraction.total.error < 1e-6
    written = load_file(tmp_path / "out.safetensors")
    for i, part in enumerate("qkv"):
        D = changed[_IN_PROJ].double() - weights[_IN_PROJ].double()
        B, A = (written[f"{_TE2}{part}_proj.lora_{side}.weight"].double() for side in ("up", "down"))
        assert written[f"{_TE2}{part}_proj.alpha"] == 2
        torch.testing.assert_close(B @ A, D[16 * i : 16 * i + 16], rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
@pytest.mark.parametrize("save", ["", "*in_proj_weight"])
def test_the_second_encoder_merges_again(tmp_path: Path, save: str, output: str) -> None:
    """What is kept whole comes back exactly; weight and bias of one module go together."""
    weights = sdxl()
    changed = of_second_encoder(weights, bias=0.5) | {_CLIP + ".layer_norm1.bias": weights[_CLIP + ".layer_norm1.bias"]}
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    changed[unet] = weights[unet] + torch.outer(torch.ones(16), random(16, seed=3))
    save_file(weights, tmp_path / "base.safetensors")
    save_file(changed, tmp_path / "tuned.safetensors")
    selection = Selection(save=(save,) if save else ())
    base, target = tmp_path / "base.safetensors", tmp_path / output
    extraction = extract(base, tmp_path / "tuned.safetensors", target, 2, selection=selection)
    assert len(extraction.of("factored")) == (1 if save else 4)
    merge(base, target, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    exact = [_IN_BIAS, *([_IN_PROJ] if save else [])]
    for name, W in changed.items():
        bound = 0.0 if name in exact and output == "out" else 1e-6
        torch.testing.assert_close(again[name].double(), W.double(), rtol=0, atol=bound)


def test_a_transformer_alone(tmp_path: Path) -> None:
    weights = flux()
    run(tmp_path, weights, tuned(weights, "double_blocks.0.img_attn.norm.query_norm.scale", "img_in.bias"))
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() >= {
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff", "diffusion_model.img_in.diff_b",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["vae", "language"])
def test_what_no_such_program_loads_is_in_our_format(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = sdxl() if kind == "vae" else language()
    run(tmp_path, weights, tuned(weights, *([_VAE] if kind == "vae" else [])))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "extract-svd" in json.dumps(json.loads(file.metadata()["loratools"])["provenance"])
    said = "first_stage_model.decoder.conv_in: no program puts an adapter there" in caplog.text
    assert said == (kind == "vae")


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    save_file(language(), tmp_path / "base.safetensors")
    save_file(tuned(language()), tmp_path / "tuned.safetensors")
    before = (tmp_path / "tuned.safetensors").read_bytes()
    with pytest.raises(OutputRefused, match="is, holds or lies in"):
        extract(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "tuned.safetensors", 2, force=True
        )
    assert (tmp_path / "tuned.safetensors").read_bytes() == before
