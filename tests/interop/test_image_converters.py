"""`convert --to diffusers` gives what diffusers' own converters of adapters give, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter.naming.image import families
from tests.make.image_families import lora, model_of, originals, shapes_of

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
WAN = HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 24, "num_layers": 2}
QWEN = HEADS | {"num_layers": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24}
FLUX2 = HEADS | {
    "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16, "in_channels": 8,
    "axes_dims_rope": (2, 2, 2, 2),
}  # fmt: skip
Z_IMAGE = {
    "dim": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "n_refiner_layers": 2, "cap_feat_dim": 16,
    "in_channels": 4, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8],
}  # fmt: skip
HIDREAM = HEADS | {
    "num_layers": 2, "num_single_layers": 2, "patch_size": 2, "in_channels": 4, "caption_channels": [16, 24],
    "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 4),
    "llama_layers": [0, 1],
}  # fmt: skip
COMFY, KOHYA = "diffusion_model.", "lora_unet_"
CASES: list[tuple[str, str, Mapping[str, Any], str, str]] = [
    ("wan", "WanTransformer3DModel", WAN, "_convert_non_diffusers_wan_lora_to_diffusers", COMFY),
    ("wan", "WanTransformer3DModel", WAN, "_convert_musubi_wan_lora_to_diffusers", KOHYA),
    ("qwen_image", "QwenImageTransformer2DModel", QWEN, "_convert_non_diffusers_qwen_lora_to_diffusers", COMFY),
    ("qwen_image", "QwenImageTransformer2DModel", QWEN, "_convert_non_diffusers_qwen_lora_to_diffusers", KOHYA),
    ("z_image", "ZImageTransformer2DModel", Z_IMAGE, "_convert_non_diffusers_z_image_lora_to_diffusers", KOHYA),
    ("flux", "FluxTransformer2DModel", FLUX, "_convert_kohya_flux_lora_to_diffusers", KOHYA),
    ("flux2", "Flux2Transformer2DModel", FLUX2, "_convert_non_diffusers_flux2_lora_to_diffusers", COMFY),
    ("flux2", "Flux2Transformer2DModel", FLUX2, "_convert_kohya_flux2_lora_to_diffusers", KOHYA),
    ("lumina2", "Lumina2Transformer2DModel", {"num_layers": 2}, "_convert_non_diffusers_lumina2_lora_to_diffusers",
     COMFY),
    ("krea2", "Krea2Transformer2DModel", {"num_layers": 2}, "_convert_non_diffusers_krea2_lora_to_diffusers", COMFY),
    ("hidream", "HiDreamImageTransformer2DModel", HIDREAM, "_convert_non_diffusers_hidream_lora_to_diffusers", COMFY),
    ("ideogram4", "Ideogram4Transformer2DModel", HEADS | {"num_layers": 2},
     "_convert_non_diffusers_ideogram4_lora_to_diffusers", COMFY),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cls", "config", "converter", "prefix"), CASES, ids=[f"{name}-{prefix}" for name, *_, prefix in CASES]
)
def test_every_linear_layer_of_the_blocks_becomes_what_diffusers_makes_of_it(
    name: str, cls: str, config: Mapping[str, Any], converter: str, prefix: str, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils

    model = model_of(getattr(diffusers, cls), **config)
    shapes = {
        module: shape
        for module, shape in shapes_of(model, (torch.nn.Linear,)).items()
        if "blocks." in module or "layers." in module
    }
    kohya = prefix == KOHYA
    tensors = lora(originals(families.get(name), shapes), prefix=prefix, kohya=kohya)
    theirs = getattr(lora_conversion_utils, converter)(dict(tensors))
    save_file(tensors, tmp_path / "a.safetensors")
    loratools.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    ours = loratools.open_adapter(tmp_path / "b.safetensors").updates
    assert {name.rpartition(".lora_")[0] for name in theirs} == ours.keys()
    assert ours.keys() == {f"transformer.{module}" for module in shapes}
    # Of matrices of 6144 × 24576 the dense products would take minutes; what they make of random vectors tells them.
    generator = torch.Generator().manual_seed(0)
    for module, update in ours.items():
        up, down = (theirs[f"{module}.lora_{factor}.weight"].double() for factor in "BA")
        left, right = (factor.double() for factor in update.factored().load())
        probes = torch.randn(down.shape[1], 4, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(
            update.scaling * (left @ (right @ probes)), up @ (down @ probes), rtol=1e-5, atol=1e-4
        )


def test_diffusers_loads_what_is_written(tmp_path: Path) -> None:
    """The whole way: a file of musubi-tuner on a model of diffusers computes what its factors say."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**WAN)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    shapes = {m: s for m, s in shapes_of(model, (torch.nn.Linear,)).items() if m.startswith("blocks.")}
    save_file(lora(originals(families.get("wan"), shapes), prefix=KOHYA, kohya=True), tmp_path / "a.safetensors")
    loratools.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    model.load_lora_adapter(str(tmp_path), weight_name="b.safetensors", prefix="transformer")
    model.fuse_lora()
    updates = loratools.open_adapter(tmp_path / "b.safetensors").updates
    assert len(updates) == len(shapes) == 20
    for module in shapes:
        delta = model.get_submodule(module).weight - before[f"{module}.weight"]
        wanted = updates[f"transformer.{module}"].delta_weight()
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-4)


SDXL_ATTENTIONS = {
    **dict.fromkeys(("input_blocks_4_1", "input_blocks_5_1"), 2),
    **dict.fromkeys(("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"), 10),
    **dict.fromkeys((f"output_blocks_{n}_1" for n in range(3)), 10),
    **dict.fromkeys((f"output_blocks_{n}_1" for n in range(3, 6)), 2),
}
"""Where sd-scripts' `SdxlUNet2DConditionModel` has a Transformer2DModel, and of how many blocks."""
LINEAR = (*(f"{attention}_to_{x}" for attention in ("attn1", "attn2") for x in ("q", "k", "v", "out_0")),
          "ff_net_0_proj", "ff_net_2")  # fmt: skip
CLIP = (*(f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")


def test_sdxl_gets_the_names_under_which_sd_scripts_looks_for_it(tmp_path: Path) -> None:
    """Of the real SDXL: the 722 modules of its UNet and the 264 of its text encoders; diffusers reads each back."""
    diffusers: Any = pytest.importorskip("diffusers")
    from tests.dialects.test_unflatten import SDXL

    unet = model_of(diffusers.UNet2DConditionModel, **SDXL, use_linear_projection=True)
    modules = [f"unet.{name}" for name, layer in unet.named_modules()
               if isinstance(layer, torch.nn.Linear) and "attentions" in name]  # fmt: skip
    modules += [
        f"{encoder}.text_model.encoder.layers.{n}.{layer}"
        for encoder, layers in (("text_encoder", 12), ("text_encoder_2", 32))
        for n in range(layers)
        for layer in (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    ]
    tensors = {}
    for number, module in enumerate(modules, 1):
        tensors[f"{module}.lora_A.weight"] = torch.tensor([[float(number)]])
        tensors[f"{module}.lora_B.weight"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    loratools.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    written = load_file(tmp_path / "b.safetensors")
    heads = {name.partition(".")[0] for name in written}
    wanted = {f"lora_unet_{a}_{p}" for a in SDXL_ATTENTIONS for p in ("proj_in", "proj_out")}
    wanted |= {f"lora_unet_{a}_transformer_blocks_{n}_{layer}" for a, depth in SDXL_ATTENTIONS.items()
               for n in range(depth) for layer in LINEAR}  # fmt: skip
    assert len(wanted) == 722  # as sd-scripts says when it starts
    wanted |= {f"lora_te{te}_text_model_encoder_layers_{n}_{layer}" for te, layers in ((1, 12), (2, 32))
               for n in range(layers) for layer in CLIP}  # fmt: skip
    assert heads == wanted
    read = diffusers.StableDiffusionXLPipeline.lora_state_dict(written, unet_config=unet.config)[0]
    of_unet = {name: tensor for name, tensor in read.items() if name.startswith("unet.")}
    theirs = diffusers.utils.convert_unet_state_dict_to_peft(of_unet)
    assert {name: tensor.item() for name, tensor in theirs.items()} == {
        name: tensor.item() for name, tensor in tensors.items() if name.startswith("unet.")
    }
    loratools.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="diffusers")
    back = load_file(tmp_path / "c.safetensors")
    assert {name: tensor.item() for name, tensor in back.items()} == {name: t.item() for name, t in tensors.items()}
