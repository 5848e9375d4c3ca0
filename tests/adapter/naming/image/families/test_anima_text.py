"""Anima's text adapter beside its model: diffusers reads both as the family says, and both are carried everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter.naming.image.families import cosmos
from loratools.adapter.naming.image.families.anima_text import FAMILY
from tests.make.image_families import TARGETS, lora, model_of, originals, prove, shapes_of
from tests.make.image_models import build

diffusers = pytest.importorskip("diffusers")


def _conditioner() -> torch.nn.Module:
    return model_of(
        diffusers.AnimaTextConditioner, source_dim=12, target_dim=8, model_dim=16, num_layers=2, num_attention_heads=2,
        target_vocab_size=10,
    )  # fmt: skip


def test_diffusers_takes_its_modules_from_the_models_names() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as convert

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("text_conditioner."): tensor for name, tensor in convert(tensors).items()}

    prove(FAMILY, _conditioner(), renamed, prefix="diffusion_model.")


@pytest.mark.parametrize("kohya", [False, True])
def test_a_lora_of_model_and_text_adapter_is_what_diffusers_makes_of_it(kohya: bool, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as convert

    linear = (torch.nn.Linear,)
    shapes = originals(cosmos.FAMILY, shapes_of(build("cosmos"), TARGETS)) | originals(
        FAMILY, shapes_of(_conditioner(), linear)
    )
    prefix = "lora_unet_" if kohya else "diffusion_model."
    save_file(lora(shapes, prefix=prefix, kohya=kohya), tmp_path / "anima.safetensors")
    loratools.convert(tmp_path / "anima.safetensors", tmp_path / "diffusers", to="diffusers")
    ours = loratools.open_adapter(tmp_path / "diffusers").updates
    theirs = convert(lora(shapes))
    assert {f"{module}.lora_A.weight" for module in ours} == {name for name in theirs if ".lora_A" in name}
    for module, update in ours.items():
        a, b = (theirs[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        product = (b.flatten(1) @ a.flatten(1)).reshape(update.shape) * (0.5 if kohya else 1)
        torch.testing.assert_close(update.delta_weight().double(), product, rtol=0, atol=1e-5, msg=module)
    loratools.convert(tmp_path / "diffusers", tmp_path / "comfy", to="comfy")
    back = loratools.open_adapter(tmp_path / "comfy").updates
    assert {module.removeprefix("diffusion_model.") for module in back} == set(shapes)


def test_it_is_merged_into_one_file(tmp_path: Path) -> None:
    shapes = originals(FAMILY, shapes_of(_conditioner(), (torch.nn.Linear,)))
    shapes |= originals(cosmos.FAMILY, shapes_of(build("cosmos"), TARGETS))
    tensors = lora(shapes)
    weights = {f"net.{module}.weight": torch.zeros(shape) for module, shape in sorted(shapes.items())}
    save_file(weights, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "lora.safetensors")
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "diffusers", to="diffusers")
    for adapter in ("lora.safetensors", "diffusers"):
        loratools.merge(tmp_path / "base.safetensors", tmp_path / adapter, tmp_path / f"merged-{Path(adapter).stem}")
        merged = load_file(next((tmp_path / f"merged-{Path(adapter).stem}").glob("*.safetensors")))
        for module, shape in shapes.items():
            a, b = (tensors[f"diffusion_model.{module}.lora_{factor}.weight"] for factor in "AB")
            product = (b.flatten(1) @ a.flatten(1)).reshape(shape)
            torch.testing.assert_close(merged[f"net.{module}.weight"], product, rtol=0, atol=1e-5, msg=module)
