"""Families of image models: their data move every row as diffusers' converters of checkpoints do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter.naming.image import families
from tests.make.image_families import model_of, prove, rows, shapes_of
from tests.make.image_models import MODELS

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
DEPTH = {"num_layers": 2, "num_single_layers": 2}
NONE = torch.zeros(1)
SCALES = re.compile(r"(query_norm|key_norm|norms\.\d+|qnorm|knorm|prenorm|postnorm|txtmlp\.0|last\.norm)\.weight")


@dataclass(frozen=True)
class Case:
    """One model: its class, its size, diffusers' converter of a checkpoint, what else that needs."""

    cls: str
    config: Mapping[str, Any]
    converter: str = ""
    also: Mapping[str, Tensor] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def tables(number: int) -> dict[str, Tensor]:
    return {f"blocks.{i}.scale_shift_table": NONE for i in range(number)}


HIDREAM = {
    "patch_size": 2, "in_channels": 4, "caption_channels": [16, 24], "text_emb_dim": 8, "num_routed_experts": 2,
    "num_activated_experts": 1, "axes_dims_rope": (4, 4), "llama_layers": [0, 1],
}  # fmt: skip
Z_IMAGE = {
    "dim": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "n_refiner_layers": 2, "cap_feat_dim": 16,
    "in_channels": 4, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8],
}  # fmt: skip
SD3 = {
    "sample_size": 8, "num_layers": 3, "joint_attention_dim": 16, "caption_projection_dim": 32,
    "pooled_projection_dim": 16, "pos_embed_max_size": 8, "in_channels": 4,
}  # fmt: skip
SANA = {
    "num_layers": 2, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32,
    "caption_channels": 16, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
SANAS = {"pos_embed": NONE, "y_embedder.y_embedding": NONE, "final_layer.scale_shift_table": NONE, **tables(2)}
FLUX2 = {"joint_attention_dim": 16, "in_channels": 8, "axes_dims_rope": (2, 2, 2, 2)}
AURA = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 16, "caption_projection_dim": 32}

CASES = {
    "hidream": Case("HiDreamImageTransformer2DModel", HEADS | DEPTH | HIDREAM,
                    "convert_hidream_transformer_to_diffusers"),
    "z_image": Case("ZImageTransformer2DModel", Z_IMAGE, "convert_z_image_transformer_checkpoint_to_diffusers"),
    "z_image omni": Case("ZImageTransformer2DModel", Z_IMAGE | {"siglip_feat_dim": 8},
                         "convert_z_image_transformer_checkpoint_to_diffusers"),
    "flux2": Case("Flux2Transformer2DModel", HEADS | DEPTH | FLUX2,
                  "convert_flux2_transformer_checkpoint_to_diffusers"),
    "flux2 klein": Case("Flux2Transformer2DModel", HEADS | DEPTH | FLUX2 | {"guidance_embeds": False},
                        "convert_flux2_transformer_checkpoint_to_diffusers"),
    "sd3": Case("SD3Transformer2DModel", HEADS | SD3, "convert_sd3_transformer_checkpoint_to_diffusers",
                {"pos_embed": NONE}),
    "sd3 3.5 medium": Case(
        "SD3Transformer2DModel", HEADS | SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        "convert_sd3_transformer_checkpoint_to_diffusers", {"pos_embed": NONE},
    ),
    # the converters of these two know the published widths only
    "lumina2": Case("Lumina2Transformer2DModel", {"num_layers": 2}, "convert_lumina2_to_diffusers"),
    "chroma": Case("ChromaTransformer2DModel", DEPTH, "convert_chroma_transformer_checkpoint_to_diffusers"),
    "krea2": Case("Krea2Transformer2DModel", {"num_layers": 2}, "convert_krea2_transformer_checkpoint_to_diffusers"),
    "minimax_h3": Case("MiniMaxH3Transformer3DModel", MODELS["minimax_h3"][2],
                       "convert_minimax_h3_transformer_checkpoint_to_diffusers"),
    "flux3": Case("Flux3Transformer2DModel", MODELS["flux3"][2], "convert_flux3_transformer_checkpoint_to_diffusers"),
    "auraflow": Case("AuraFlowTransformer2DModel", HEADS | AURA, "convert_auraflow_transformer_checkpoint_to_diffusers",
                     {"positional_encoding": NONE, "register_tokens": NONE}),
    "sana": Case("SanaTransformer2DModel", HEADS | SANA, "convert_sana_transformer_to_diffusers", SANAS),
    "cascade": Case(
        "StableCascadeUNet",
        {
            "conditioning_dim": 32, "block_out_channels": (32, 32), "num_attention_heads": (4, 4),
            "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "switch_level": (False,),
            "clip_text_in_channels": 16, "clip_text_pooled_in_channels": 16, "clip_image_in_channels": 16,
        },
        "convert_stable_cascade_unet_single_file_to_diffusers",
    ),
    "ernie_image": Case("ErnieImageTransformer2DModel", {"num_layers": 2},
                        "convert_ernie_image_transformer_checkpoint_to_diffusers"),
}  # fmt: skip
ALIKE = {
    "ideogram4": Case("Ideogram4Transformer2DModel", HEADS | {"num_layers": 2}),
    "pixart": Case("PixArtTransformer2DModel", HEADS | {"num_layers": 2, "caption_channels": 16, "sample_size": 128}),
    "sana 1.5": Case("SanaTransformer2DModel", HEADS | SANA | {"qk_norm": "rms_norm_across_heads"}),
    "sana_sprint": Case("SanaTransformer2DModel", HEADS | SANA | {"guidance_embeds": True}),
    "bria": Case("BriaTransformer2DModel", HEADS | DEPTH),
    "fibo": Case("BriaFiboTransformer2DModel", HEADS | DEPTH | {"guidance_embeds": True, "time_theta": 1e4}),
    "fibo2": Case("BriaFibo2Transformer2DModel", {}),
}  # fmt: skip
"""Models for whose checkpoints diffusers has no converter: their names only."""


def converter(name: str) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """Return diffusers' converter, for tensors that are called as the files of these models call them."""
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, name)

    def called(key: str) -> str:
        return key.removesuffix("weight") + "scale" if SCALES.search(key) else key

    def run(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        files = {called(key): tensor for key, tensor in tensors.items()}
        for key in [key for key in files if ".attn.to_q." in key and "cascade" in name]:
            kind = key.rpartition(".")[2]
            fused = torch.cat([files.pop(key.replace("to_q", f"to_{x}")) for x in "qkv"])
            files[key.replace(f"to_q.{kind}", f"in_proj_{kind}")] = fused
        return dict(convert(files, config=None))

    return run


@pytest.mark.parametrize("name", CASES)
def test_diffusers_converter_moves_rows_where_the_family_says(name: str) -> None:
    case = CASES[name]
    model = model_of(getattr(diffusers, case.cls), **case.config)
    also = {key: tensor.clone() for key, tensor in case.also.items()}
    prove(families.get(name.split()[0]), model, converter(case.converter), also=also, without=case.without)


@pytest.mark.parametrize("name", ALIKE)
def test_every_module_of_the_model_has_a_name_in_the_original(name: str) -> None:
    case = ALIKE[name]
    shapes = shapes_of(model_of(getattr(diffusers, case.cls), **case.config))
    assert rows(families.get(name.split()[0]), shapes).keys() == shapes.keys()


@pytest.mark.parametrize(("one", "other"), [("flux", "chroma"), ("pixart", "sana"), ("sana", "sana_sprint")])
def test_families_that_share_a_block_agree_on_its_names(one: str, other: str) -> None:
    """Where two families have a block's module in common, both lead to the same name: either may be meant."""
    a, b = families.get(one), families.get(other)
    shared = [name for name in a.renames if name in b.renames and "{}" in name]
    assert shared
    assert [a.renames[name] for name in shared] == [b.renames[name] for name in shared]
    assert a.fused == b.fused
