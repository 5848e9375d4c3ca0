"""Diffusers' classes of every family, as deep as the published models and as narrow as their code lets them be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.families import Family
from tests.make.image_families import model_of, originals, rows, shapes_of

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


@dataclass(frozen=True)
class Model:
    """One model: diffusers' class and the pipeline that loads its adapters, its size.

    `wide` is what diffusers' converter of adapters needs to be as it is published; {} where any size will do.
    """

    cls: str
    config: Mapping[str, Any]
    pipeline: str = ""
    wide: Mapping[str, Any] = field(default_factory=dict)


FLUX = {"in_channels": 8, "joint_attention_dim": 12, "num_layers": 19, "num_single_layers": 38}
BRIA = {"in_channels": 8, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)}
SANA = {
    "num_layers": 20, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
    "caption_channels": 12, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
HUNYUAN = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 12}

MODELS: Mapping[str, Model] = {
    "flux": Model(
        "FluxTransformer2DModel",
        HEADS | FLUX | {"pooled_projection_dim": 6, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)},
        "FluxPipeline", {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    ),
    "wan": Model(
        "WanTransformer3DModel",
        HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 24, "num_layers": 40},
        "WanPipeline",
    ),
    "qwen_image": Model(
        "QwenImageTransformer2DModel",
        HEADS | {"num_layers": 60, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4), "in_channels": 8},
        "QwenImagePipeline",
    ),
    "ltx": Model(
        "LTXVideoTransformer3DModel",
        HEADS | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "num_layers": 28,
                 "caption_channels": 12},
        "LTXPipeline",
    ),
    "ltx2": Model(
        "LTX2VideoTransformer3DModel",
        HEADS | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "audio_in_channels": 8,
                 "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
                 "audio_cross_attention_dim": 8, "num_layers": 48, "caption_channels": 12},
        "LTX2Pipeline",
    ),
    "hidream": Model(
        "HiDreamImageTransformer2DModel",
        HEADS | {"patch_size": 2, "in_channels": 4, "caption_channels": [12, 14], "text_emb_dim": 6, "num_layers": 16,
                 "num_single_layers": 32, "num_routed_experts": 4, "num_activated_experts": 2,
                 "axes_dims_rope": (4, 4), "llama_layers": list(range(48))},
        "HiDreamImagePipeline",
    ),
    "z_image": Model(
        "ZImageTransformer2DModel",
        {"dim": 24, "n_heads": 3, "n_kv_heads": 3, "n_layers": 30, "n_refiner_layers": 2, "cap_feat_dim": 12,
         "in_channels": 4, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8]},
        "ZImagePipeline",
    ),
    "flux2": Model(
        "Flux2Transformer2DModel",
        HEADS | {"in_channels": 8, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 2, 2), "num_layers": 8,
                 "num_single_layers": 48},
        "Flux2Pipeline",
    ),
    "sd3": Model(
        "SD3Transformer2DModel",
        HEADS | {"sample_size": 8, "num_layers": 24, "joint_attention_dim": 12, "caption_projection_dim": 16,
                 "pooled_projection_dim": 6, "pos_embed_max_size": 8, "in_channels": 4,
                 "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        "StableDiffusion3Pipeline",
    ),
    "hunyuan_video": Model(
        "HunyuanVideoTransformer3DModel",
        HEADS | HUNYUAN | {"num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2,
                           "pooled_projection_dim": 6, "rope_axes_dim": (2, 2, 4)},
        "HunyuanVideoPipeline",
        {"num_attention_heads": 24, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)},
    ),
    "hunyuan_video_15": Model(
        "HunyuanVideo15Transformer3DModel",
        HEADS | HUNYUAN | {"num_layers": 54, "text_embed_2_dim": 6, "image_embed_dim": 10, "rope_axes_dim": (2, 2, 4)},
    ),
    "hunyuan_image": Model(
        "HunyuanImageTransformer2DModel",
        HEADS | HUNYUAN | {"num_layers": 20, "num_single_layers": 40, "text_embed_2_dim": 6, "rope_axes_dim": (4, 4)},
    ),
    "lumina2": Model(
        "Lumina2Transformer2DModel",
        {"hidden_size": 24, "num_attention_heads": 3, "num_kv_heads": 1, "num_layers": 26, "num_refiner_layers": 2,
         "multiple_of": 8, "cap_feat_dim": 12, "in_channels": 4, "axes_dim_rope": (4, 2, 2)},
        "Lumina2Pipeline",
        {"hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8, "multiple_of": 256,
         "axes_dim_rope": (32, 32, 32)},
    ),
    "chroma": Model(
        "ChromaTransformer2DModel",
        HEADS | FLUX | {"axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8, "approximator_hidden_dim": 12},
        "ChromaPipeline", {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    ),
    "krea2": Model(
        "Krea2Transformer2DModel",
        {"num_layers": 28, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
         "attention_head_dim": 4, "in_channels": 4, "timestep_embed_dim": 8, "text_hidden_dim": 16,
         "num_text_layers": 3, "text_num_attention_heads": 4, "text_num_key_value_heads": 4,
         "text_intermediate_size": 24, "axes_dims_rope": (2, 2, 0)},
        "Krea2Pipeline",
    ),
    "cosmos": Model(
        "CosmosTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 28,
         "text_embed_dim": 12, "adaln_lora_dim": 4, "extra_pos_embed_type": None},
    ),
    "ideogram4": Model(
        "Ideogram4Transformer2DModel",
        HEADS | {"num_layers": 34, "in_channels": 4, "intermediate_size": 24, "adaln_dim": 6, "llm_features_dim": 12,
                 "mrope_section": (2, 1, 1)},
        "Ideogram4Pipeline",
    ),
    "kandinsky5": Model(
        "Kandinsky5Transformer3DModel",
        {"in_text_dim": 12, "in_text_dim2": 6, "time_dim": 8, "model_dim": 16, "ff_dim": 24, "num_text_blocks": 2,
         "num_visual_blocks": 32, "axes_dims": (2, 2, 4)},
        "Kandinsky5T2VPipeline",
    ),
    "auraflow": Model(
        "AuraFlowTransformer2DModel",
        HEADS | {"num_mmdit_layers": 4, "num_single_dit_layers": 32, "joint_attention_dim": 12,
                 "caption_projection_dim": 16, "pos_embed_max_size": 16, "sample_size": 8},
        "AuraFlowPipeline",
    ),
    "mochi": Model(
        "MochiTransformer3DModel",
        HEADS | {"num_layers": 48, "pooled_projection_dim": 12, "in_channels": 4, "text_embed_dim": 12,
                 "time_embed_dim": 8},
        "MochiPipeline",
    ),
    "pixart": Model(
        "PixArtTransformer2DModel",
        HEADS | {"num_layers": 28, "caption_channels": 12, "sample_size": 128, "cross_attention_dim": 16},
    ),
    "sana": Model("SanaTransformer2DModel", HEADS | SANA, "SanaPipeline"),
    "sana_sprint": Model(
        "SanaTransformer2DModel", HEADS | SANA | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        "SanaSprintPipeline",
    ),
    "cascade": Model(
        "StableCascadeUNet",
        {"conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
         "down_num_layers_per_block": (1, 2), "up_num_layers_per_block": (2, 1), "switch_level": (False,),
         "clip_text_in_channels": 12, "clip_text_pooled_in_channels": 12, "clip_image_in_channels": 12},
    ),
    "ace_step_15": Model(
        "AceStepTransformer1DModel",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 24, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4},
        "AceStepPipeline",
    ),
    "ernie_image": Model(
        "ErnieImageTransformer2DModel",
        {"num_layers": 36, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 12, "rope_axes_dim": (2, 2, 4)},
        "ErnieImagePipeline",
    ),
    "bria": Model("BriaTransformer2DModel", HEADS | BRIA | {"num_layers": 8, "num_single_layers": 28}),
    "fibo": Model(
        "BriaFiboTransformer2DModel",
        HEADS | BRIA | {"num_layers": 8, "num_single_layers": 38, "text_encoder_dim": 12}, "BriaFiboPipeline",
    ),
    "fibo2": Model(
        "BriaFibo2Transformer2DModel",
        {"in_channels": 4, "dim": 32, "n_heads": 2, "cap_feat_dim": 12, "axes_dims": (8, 4, 4)}, "BriaFibo2Pipeline",
    ),
    "minimax_h3": Model(
        "MiniMaxH3Transformer3DModel",
        HEADS | {"hidden_size": 12, "num_layers": 50, "ffn_dim": 20, "in_channels": 4, "audio_in_channels": 4,
                 "text_dim": 10, "freq_dim": 8, "time_embed_hidden_dim": 12, "time_embed_dim": 6, "rope_freq_dim": 2},
    ),
    "flux3": Model(
        "Flux3Transformer2DModel",
        HEADS | {"in_channels": 4, "cond_in_channels": 4, "num_layers": 5, "num_single_layers": 28,
                 "joint_attention_dim": 12, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
    ),
}  # fmt: skip
"""By the family of which each is; OmniGen2 is no class of diffusers."""

PACKED: Mapping[str, str] = {
    "hunyuan_video_comfy": "hunyuan_video", "hunyuan_video_15_comfy": "hunyuan_video_15",
    "hunyuan_image_tencent": "hunyuan_image",
}  # fmt: skip
"""Families that call the modules of another's model otherwise: what ComfyUI or Tencent make of its checkpoint."""


def model_of_family(name: str) -> Model:
    """Return the model of a family."""
    return MODELS[PACKED.get(name, name)]


@dataclass(frozen=True)
class Modules:
    """What an adapter of a model changes.

    `shapes`     diffusers' modules of the layers that trainers choose, of the first and last blocks
    `places`     for each the original's module and its rows there, in order
    `originals`  the original's modules with their shapes
    """

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[str, list[int]]]
    originals: Mapping[str, tuple[int, ...]]

    def only(self, chosen: Callable[[str], bool]) -> Modules:
        """Return those of the original's modules of which every part of diffusers' is chosen."""
        left = {original for module, (original, _) in self.places.items() if not chosen(module)}
        places = {module: place for module, place in self.places.items() if place[0] not in left}
        originals = {name: shape for name, shape in self.originals.items() if name not in left}
        return Modules(self.family, {module: self.shapes[module] for module in places}, places, originals)


def modules(name: str, *, wide: bool = False) -> Modules:
    """Return the modules of a family's model; `wide` as diffusers' converter of adapters needs it, in all blocks."""
    import diffusers

    model, family = model_of_family(name), families.get(name)
    built = model_of(getattr(diffusers, model.cls), **{**model.config, **(model.wide if wide else {})})
    layers = shapes_of(built, (torch.nn.Linear, torch.nn.Conv2d))
    grouped = {n for n, layer in built.named_modules() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
    shapes = {n: shape for n, shape in layers.items() if n not in grouped and (wide or _chosen(n, layers))}
    return Modules(family, shapes, rows(family, shapes), originals(family, shapes))


def _chosen(module: str, every: Mapping[str, Any]) -> bool:
    """Tell whether a module is of no block, or of its list's first or last."""
    blocks, _, rest = module.partition(".")
    number = rest.partition(".")[0]
    if not number.isdigit():
        blocks, number = ".".join(module.split(".")[:2]), "".join(module.split(".")[2:3])
    if not number.isdigit():
        return True
    numbers = [name.removeprefix(f"{blocks}.").partition(".")[0] for name in every if name.startswith(f"{blocks}.")]
    return int(number) in (0, max(int(n) for n in numbers if n.isdigit()))
