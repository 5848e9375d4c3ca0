"""Tiny diffusers models of the real shapes, with PEFT adapters on them; what diffusers itself makes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes)


def clip(*, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def flux(layers: int = 2, single: int = 2) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=layers, num_single_layers=single, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def pipeline(name: str) -> Any:
    """Return a pipeline of Stable Diffusion 1 or Flux shape, without what no adapter touches."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline

    if name == "flux":
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=clip(), tokenizer=None,
            text_encoder_2=None, tokenizer_2=None, transformer=flux(),
        )  # fmt: skip
    if name == "sdxl":
        from diffusers import StableDiffusionXLPipeline

        extra = {
            "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80, "use_linear_projection": True,
        }  # fmt: skip
        return StableDiffusionXLPipeline(
            vae=None, text_encoder=clip(), text_encoder_2=clip(projection=True), tokenizer=None, tokenizer_2=None,
            unet=unet(**extra), scheduler=DDIMScheduler(clip_sample=False),
        )  # fmt: skip
    return StableDiffusionPipeline(
        vae=None, text_encoder=clip(), tokenizer=None, unet=unet(), scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train(model: Any, targets: list[str], **config: Any) -> Any:
    """Put a PEFT adapter with random factors on a model, and return its config."""
    from peft import LoraConfig

    wanted = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets} | config)
    model.add_adapter(wanted)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if "lora_A" in parameter_name or "lora_B" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return wanted


def deltas(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return module -> ΔW as PEFT computes it for the one adapter on a model."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{prefix}{name}": module.get_delta_weight(next(iter(module.lora_A))).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def loaded(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Let diffusers load a file into a fresh pipeline; return all ΔW by component and module."""
    pipe = pipeline(name)
    pipe.load_lora_weights(path)
    found = {}
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        if model is not None:
            found |= deltas(model, f"{component}.")
    return found
