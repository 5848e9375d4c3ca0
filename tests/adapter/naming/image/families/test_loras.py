"""LoRAs in the original's names, dotted and flattened, become what diffusers' own converters make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.adapter.naming.image import families
from tests.make.image_families import TARGETS, lora, originals, rows, shapes_of
from tests.make.image_models import MODELS, build

pytest.importorskip("diffusers")

Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def _converter(name: str) -> Convert:
    from diffusers.loaders import lora_conversion_utils

    convert: Convert = getattr(lora_conversion_utils, name)
    return convert


_FLUX3 = (
    "timestep", "target_timestep", "early_stream", "single_stream", "x_embedders", "context", "norm_out", "proj_out",
)  # fmt: skip
CASES = [
    ("wan", "_convert_non_diffusers_wan_lora_to_diffusers", "diffusion_model.", False, ("patch_embedding",)),
    ("wan_image", "_convert_non_diffusers_wan_lora_to_diffusers", "diffusion_model.", False, ("patch_embedding",)),
    ("wan", "_convert_musubi_wan_lora_to_diffusers", "lora_unet_", True, ("patch_embedding", "condition", "proj_out")),
    ("wan_image", "_convert_musubi_wan_lora_to_diffusers", "lora_unet_", True,
     ("patch_embedding", "condition", "proj_out")),
    ("qwen_image", "_convert_non_diffusers_qwen_lora_to_diffusers", "diffusion_model.", False, ()),
    ("qwen_image", "_convert_non_diffusers_qwen_lora_to_diffusers", "lora_unet_", True, ()),
    ("ltx2", "_convert_non_diffusers_ltx2_lora_to_diffusers", "diffusion_model.", False, ()),
    ("ltx2_3", "_convert_non_diffusers_ltx2_lora_to_diffusers", "diffusion_model.", False, ()),
    ("minimax_h3", "_convert_non_diffusers_minimax_h3_lora_to_diffusers", "diffusion_model.", False, ()),
    ("minimax_h3", "_convert_non_diffusers_minimax_h3_lora_to_diffusers", "lora_unet_", True, ()),
    ("flux3", "_convert_non_diffusers_flux3_lora_to_diffusers", "diffusion_model.", False, _FLUX3),
    ("cosmos", "_convert_non_diffusers_anima_lora_to_diffusers", "diffusion_model.", False, ()),
]  # fmt: skip
"""Model, diffusers' converter, what stands before names, whether they are flat, modules that the converter lacks."""


@pytest.mark.parametrize(("name", "converter", "prefix", "kohya", "without"), CASES)
def test_a_lora_is_what_diffusers_makes_of_it(
    name: str, converter: str, prefix: str, kohya: bool, without: tuple[str, ...], tmp_path: Path
) -> None:
    family = families.get(MODELS[name][0])
    shapes = {module: shape for module, shape in shapes_of(build(name), TARGETS).items()
              if not module.startswith(without)} if without else shapes_of(build(name), TARGETS)  # fmt: skip
    assert rows(family, shapes).keys() == shapes.keys()
    tensors = lora(originals(family, shapes), prefix=prefix, kohya=kohya)
    save_file(tensors, tmp_path / "lora.safetensors")
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "diffusers", to="diffusers")
    ours = loratools.open_adapter(tmp_path / "diffusers").updates
    theirs = _converter(converter)(dict(tensors))
    assert {f"{module}.lora_A.weight" for module in ours} == {key for key in theirs if key.endswith("lora_A.weight")}
    for module, update in ours.items():
        a, b = (theirs[f"{module}.lora_{factor}.weight"].double().flatten(1) for factor in "AB")
        delta = (b @ a).reshape(update.shape)
        torch.testing.assert_close(update.delta_weight().double(), delta, rtol=0, atol=1e-5, msg=module)
