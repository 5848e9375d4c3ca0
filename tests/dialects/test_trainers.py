"""What trainers of image models write besides kohya's, ComfyUI's and diffusers' own names: read as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import LoraToolsError

RANK = 2


def pair(module: str, out: int, width: int, *, kohya: bool = False, default: str = "") -> dict[str, Tensor]:
    """Return random factors of a module under kohya's endings or PEFT's."""
    generator = torch.Generator().manual_seed(len(module))
    ends = ("lora_down.weight", "lora_up.weight") if kohya else (f"lora_A.{default}weight", f"lora_B.{default}weight")
    a = torch.randn(RANK, width, generator=generator)
    return {f"{module}.{ends[0]}": a, f"{module}.{ends[1]}": torch.randn(out, RANK, generator=generator)}


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize(
    ("module", "kohya"),
    [
        ("diffusion_model.double_blocks.0.img_attn.proj", False),
        ("transformer.transformer_blocks.0.attn.to_out.0", False),
        ("lora_unet_double_blocks_0_img_attn_proj", True),
    ],
)
def test_a_magnitude_of_ai_toolkit_is_that_of_dora(tmp_path: Path, module: str, kohya: bool) -> None:
    magnitude = torch.rand(12) + 1
    tensors = pair(module, 12, 12, kohya=kohya)
    lora = written(tmp_path, {**tensors, f"{module}.magnitude": magnitude})
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    save_file({"double_blocks.0.img_attn.proj.weight": weight}, tmp_path / "base.safetensors")
    loratools.merge(tmp_path / "base.safetensors", lora, tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))["double_blocks.0.img_attn.proj.weight"]
    a, b = tensors.values()
    changed = weight.double() + b.double() @ a.double()
    wanted = changed * (magnitude.double() / changed.norm(dim=1))[:, None]
    torch.testing.assert_close(merged.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("image", ["diffusion_model.double_blocks.0.img_attn.proj",
                                   "transformer.transformer_blocks.0.attn.to_out.0"])  # fmt: skip
def test_dotted_prefixes_of_text_encoders_are_their_components(tmp_path: Path, image: str) -> None:
    encoders = ("lora_te1.text_model.encoder.layers.0.mlp.fc1", "lora_te2.encoder.block.0.layer.0.SelfAttention.q")
    tensors = {name: tensor for module in (image, *encoders) for name, tensor in pair(module, 8, 8).items()}
    updates = loratools.open_adapter(written(tmp_path, tensors)).updates
    assert set(updates) == {
        image, "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }  # fmt: skip


def test_a_checkpoints_prefix_is_the_image_models(tmp_path: Path) -> None:
    lora = written(tmp_path, pair("model.diffusion_model.double_blocks.0.img_attn.proj", 8, 8))
    assert set(loratools.open_adapter(lora).updates) == {"diffusion_model.double_blocks.0.img_attn.proj"}


def test_a_flattened_name_may_end_in_another_underscore(tmp_path: Path) -> None:
    lora = written(tmp_path, pair("lora_unet_single_transformer_blocks_0_attn_to_k_", 8, 8, kohya=True))
    assert set(loratools.open_adapter(lora).updates) == {"transformer.single_transformer_blocks.0.attn.to_k"}


def test_anima_with_its_text_encoder_through_each_naming(tmp_path: Path) -> None:
    """Cross attentions are the image model's, though its text adapter has the same ones in diffusers."""
    modules = ("lora_unet_blocks_0_cross_attn_k_proj", "lora_te_layers_0_self_attn_q_proj")
    tensors = {name: tensor for module in modules for name, tensor in pair(module, 8, 8, kohya=True).items()}
    lora = written(tmp_path, tensors)
    assert set(loratools.open_adapter(lora).updates) == {
        "diffusion_model.blocks.0.cross_attn.k_proj", "text_encoder.layers.0.self_attn.q_proj",
    }  # fmt: skip
    loratools.convert(lora, tmp_path / "comfy.safetensors", to="comfy")
    names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "comfy.safetensors")}
    assert names == {
        "diffusion_model.blocks.0.cross_attn.k_proj",
        "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj",
    }
    assert set(loratools.open_adapter(tmp_path / "comfy.safetensors").updates) == set(
        loratools.open_adapter(lora).updates
    )


def test_a_text_encoder_inside_comfys_file_takes_its_part(tmp_path: Path) -> None:
    tensors = pair("lora_te_layers_0_self_attn_q_proj", 8, 8, kohya=True)
    image = pair("lora_unet_blocks_0_cross_attn_k_proj", 8, 8, kohya=True)
    names = ("model.diffusion_model.blocks.0.cross_attn.k_proj.weight",
             "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj.weight")  # fmt: skip
    save_file({name: torch.zeros(8, 8) for name in names}, tmp_path / "base.safetensors")
    loratools.merge(tmp_path / "base.safetensors", written(tmp_path, image | tensors), tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    for name, (a, b) in zip(names, (image.values(), tensors.values()), strict=True):
        torch.testing.assert_close(merged[name].double(), b.double() @ a.double(), rtol=0, atol=1e-5)


def test_a_language_model_alone_is_not_called_clip(tmp_path: Path) -> None:
    lora = written(tmp_path, pair("lora_te_layers_0_self_attn_q_proj", 8, 8, kohya=True))
    with pytest.raises(LoraToolsError, match="its name in the original implementation is not known"):
        loratools.convert(lora, tmp_path / "comfy.safetensors", to="comfy")


def test_kohya_has_no_place_for_a_second_image_model(tmp_path: Path) -> None:
    modules = ("transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q")
    lora = written(tmp_path, {name: t for module in modules for name, t in pair(module, 8, 8).items()})
    with pytest.raises(LoraToolsError, match="one image model"):
        loratools.convert(lora, tmp_path / "kohya.safetensors", to="kohya")
    loratools.convert(lora, tmp_path / "first.safetensors", to="kohya", allow_loss=True)
    names = {name.partition(".")[0] for name in load_file(tmp_path / "first.safetensors")}
    assert names == {"lora_unet_blocks_0_self_attn_q"}


def test_diffsynths_heads_of_minimax_h3_become_the_stack_that_files_have(tmp_path: Path) -> None:
    """DiffSynth trains the interleaved rows of MiniMax's shards; diffusers reads its files so too."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils

    tensors = pair("blocks.0.attn.qkv_proj", 768, 12, default="default.")
    loratools.convert(written(tmp_path, tensors), tmp_path / "diffusers", to="diffusers")
    theirs = lora_conversion_utils._convert_non_diffusers_minimax_h3_lora_to_diffusers(dict(tensors))
    updates = loratools.open_adapter(tmp_path / "diffusers").updates
    assert set(updates) == {f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"}
    for module, update in updates.items():
        delta = theirs[f"{module}.lora_B.weight"].double() @ theirs[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(update.delta_weight().double(), delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "width", "families"),
    [
        ("transformer_blocks.0.attn.to_q", 6144, ("Flux.2", "Krea 2")),
        ("transformer_blocks.0.attn.to_q", 4096, ("Flux.2", "Qwen-Image 2.1")),
        ("single_transformer_blocks.0.attn.to_q", 3072, ("Flux.1", "AuraFlow")),
    ],
)
def test_widths_that_several_published_models_have_decide_nothing(
    tmp_path: Path, module: str, width: int, families: tuple[str, str]
) -> None:
    lora = written(tmp_path, pair(f"transformer.{module}", width, width))
    with pytest.raises(LoraToolsError, match="a base model") as refusal:
        loratools.convert(lora, tmp_path / "kohya.safetensors", to="kohya")
    assert all(family in str(refusal.value) for family in families)
