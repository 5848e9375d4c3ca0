"""Tiny image models of the real block structure: as pipelines on disk, as one original file, and what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loratools.adapter.naming.image.readings import Lead, Reading, leads

TE = ["q_proj", "k_proj", "out_proj", "fc1"]
TARGETS: Mapping[str, Mapping[str, list[str]]] = {
    "sd": {"unet": ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv", "time_emb_proj"], "text_encoder": TE},
    "sdxl": {
        "unet": ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv2"],
        "text_encoder": TE,
        "text_encoder_2": TE,
    },
    "flux": {
        "transformer": [
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out",
            "norm.linear",
        ],
        "text_encoder": TE,
    },
}  # fmt: skip


def unet(*, xl: bool = False) -> Any:
    import diffusers

    make: Any = diffusers.UNet2DConditionModel
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "layers_per_block": 2, "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4,
        "norm_num_groups": 4, "block_out_channels": (8, 16, 16, 16),
    }  # fmt: skip
    if xl:
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16, 16), "transformer_layers_per_block": (1, 2, 3), "cross_attention_dim": 64,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 80,
        }  # fmt: skip
    return make(**config)


def clip(seed: int = 0, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        projection_dim=32, max_position_embeddings=16,
    )  # fmt: skip
    model: Any = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model.eval()


def flux() -> Any:
    import diffusers

    make: Any = diffusers.FluxTransformer2DModel
    torch.manual_seed(0)
    return make(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def pipeline(name: str) -> Any:
    """Return a pipeline of Stable Diffusion 1, SDXL or Flux shape, without VAE and tokenizers."""
    import diffusers as package

    diffusers: Any = package
    none: Any = dict.fromkeys(("vae", "tokenizer"))
    if name == "flux":
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        none |= dict.fromkeys(("text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"))
        return diffusers.FluxPipeline(scheduler=scheduler, text_encoder=clip(), transformer=flux(), **none)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    none |= dict.fromkeys(("image_encoder", "feature_extractor"))
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=clip(), text_encoder_2=clip(1, projection=True), unet=unet(xl=True), scheduler=scheduler,
            tokenizer_2=None, **none,
        )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        text_encoder=clip(), unet=unet(), scheduler=scheduler, safety_checker=None, requires_safety_checker=False,
        **none,
    )  # fmt: skip


def reopened(name: str, folder: Path) -> Any:
    """Return the pipeline that diffusers and transformers load from a folder."""
    fresh = untouched(name)
    parts = {
        component: type(getattr(fresh, component)).from_pretrained(folder / component)
        for component in components(fresh)
    }
    others = {component: getattr(fresh, component, None) for component in fresh.components}
    return type(fresh)(**others | parts | ({"requires_safety_checker": False} if name == "sd" else {}))


@cache
def untouched(name: str) -> Any:
    """Return `pipeline(name)`, made once: to be read only."""
    return pipeline(name)


def class_of(name: str, component: str) -> Any:
    """Return the class of a pipeline's component."""
    return type(getattr(untouched(name), component))


def components(pipe: Any) -> list[str]:
    return [
        component
        for component in ("unet", "transformer", "text_encoder", "text_encoder_2")
        if getattr(pipe, component, None)
    ]


def trained(pipe: Any, targets: Mapping[str, list[str]], folder: Path, *, scale: float = 0.3, **config: Any) -> Any:
    """Put adapters with random factors on a pipeline, and let diffusers write them."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    layers, models = {}, {}
    generator = torch.Generator().manual_seed(3)
    for component, modules in targets.items():
        model = models[component] = getattr(pipe, component)
        wanted: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": modules} | config
        model.add_adapter(LoraConfig(**wanted))
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(models))
    return pipe


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def outputs(pipe: Any) -> dict[str, torch.Tensor]:
    """Return what each model computes from fixed inputs, and the latents of two steps of the whole pipeline."""
    results = {}
    for name in components(pipe):
        model = getattr(pipe, name).eval()
        if name.startswith("text_encoder"):
            ids = torch.tensor([[5, 17, 3, 88, 98]])
            results[name] = model(ids, output_hidden_states=True).hidden_states[-1]
            if "WithProjection" in type(model).__name__:
                results[f"{name}.pooled"] = model(ids).text_embeds
        elif name == "unet":
            xl = model.config.addition_embed_type is not None
            added = {"text_embeds": noise(1, 32), "time_ids": noise(1, 6)} if xl else None
            results[name] = model(
                noise(1, 4, 8, 8), 7, noise(1, 5, model.config.cross_attention_dim), added_cond_kwargs=added
            ).sample
        else:
            results[name] = model(
                noise(1, 9, 4), noise(1, 5, 32), noise(1, 32), torch.tensor([0.5]), img_ids=noise(9, 3),
                txt_ids=torch.zeros(5, 3), guidance=torch.tensor([3.5]),
            ).sample  # fmt: skip
    if "unet" in results:
        width = pipe.unet.config.cross_attention_dim
        arguments: dict[str, Any] = {"prompt_embeds": noise(1, 5, width), "guidance_scale": 1.0}
        if "text_encoder_2" in results:
            arguments |= {"pooled_prompt_embeds": noise(1, 32)}
        pipe.set_progress_bar_config(disable=True)
        results["pipeline"] = pipe(
            latents=noise(1, 4, 8, 8), num_inference_steps=2, output_type="latent", height=64, width=64, **arguments
        ).images
    return results


def distance(ours: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Return the largest difference of any output, as a part of that output's largest number."""
    assert ours.keys() == wanted.keys()
    return max(float((ours[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


def original(pipe: Any) -> dict[str, torch.Tensor]:
    """Return a pipeline's tensors as one original checkpoint has them; `from_original` is diffusers' own way back."""
    if getattr(pipe, "transformer", None) is not None:
        return _flux_original(pipe.transformer.state_dict())
    xl = hasattr(pipe, "text_encoder_2")
    tensors = {}
    for name, tensor in pipe.unet.state_dict().items():
        module, _, parameter = name.rpartition(".")
        original = to_original(module, "sdxl" if xl else "sd").names[0]
        tensors[f"model.diffusion_model.{original}.{parameter}"] = tensor
    tensors |= _prefixed(
        "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer.", _clip(pipe.text_encoder)
    )
    if xl:
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(_clip(pipe.text_encoder_2)))
    return tensors


def to_original(module: str, family: str) -> Lead:
    """Return where a module of diffusers leads to in the original; `from_original` proves it."""
    return leads(Reading(family, "diffusers"), [module], "original")[module]


def _prefixed(root: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {root + name: tensor for name, tensor in tensors.items()}


def _clip(model: Any) -> dict[str, torch.Tensor]:
    """Return a text encoder's tensors by the names that checkpoints have, with the level `text_model`."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if "position_ids" not in name
    }


def _open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    open_clip = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T.contiguous(),
    }
    open_clip |= {f"ln_final.{end}": tensors[f"text_model.final_layer_norm.{end}"] for end in ("weight", "bias")}
    names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "layer_norm1": "ln_1", "layer_norm2": "ln_2"}  # fmt: skip
    for layer in range(2):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            open_clip |= {f"{theirs}.{new}.{end}": tensors[f"{ours}.{old}.{end}"] for old, new in names.items()}
            fused = [tensors[f"{ours}.self_attn.{name}_proj.{end}"] for name in "qkv"]
            open_clip[f"{theirs}.attn.in_proj_{end}"] = torch.cat(fused)
    return open_clip


def _flux_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    original, parts = {}, dict[str, dict[int, torch.Tensor]]()
    norms = {"norm_q": "query_norm", "norm_k": "key_norm", "norm_added_q": "query_norm", "norm_added_k": "key_norm"}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in norms:
            kind, number = parent.split(".")[:2]
            stream = "txt_attn." if "added" in last else "img_attn." if kind == "transformer_blocks" else ""
            block = "double" if kind == "transformer_blocks" else "single"
            original[f"{block}_blocks.{number}.{stream}norm.{norms[last]}.scale"] = tensor
            continue
        lead = to_original(module, "flux")
        if lead.part is None:
            halves = tensor.chunk(2)
            swap = module == "norm_out.linear"
            original[f"{lead.names[0]}.{parameter}"] = torch.cat([halves[1], halves[0]]) if swap else tensor
        else:
            parts.setdefault(f"{lead.names[0]}.{parameter}", {})[lead.part] = tensor
    return original | {name: torch.cat([blocks[i] for i in sorted(blocks)]) for name, blocks in parts.items()}


def save_original(pipe: Any, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in original(pipe).items()}, path, {"format": "pt"})
    return path


def from_original(name: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return a pipeline with the tensors of one original checkpoint, converted by diffusers' own functions."""
    from diffusers.loaders import single_file_utils

    convert: Any = single_file_utils
    pipe = pipeline(name)
    if name == "flux":
        convert_flux = resized(convert.convert_flux_transformer_checkpoint_to_diffusers, "inner_dim = 3072")
        pipe.transformer.load_state_dict(convert_flux(dict(tensors)))
        return pipe
    pipe.unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(tensors), pipe.unet.config))
    root = "conditioner.embedders.0.transformer." if name == "sdxl" else "cond_stage_model.transformer."
    _load(pipe.text_encoder, convert.convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=root))
    if name == "sdxl":
        state = convert.convert_open_clip_checkpoint(
            pipe.text_encoder_2, dict(tensors), prefix="conditioner.embedders.1.model."
        )
        _load(pipe.text_encoder_2, state)
    return pipe


def resized(function: Any, *lines: str) -> Any:
    """Return a function of diffusers with Flux.1's sizes, in these lines of its source, made the tiny model's."""
    source, scope = inspect.getsource(function), dict(function.__globals__)
    for line in lines:
        assert source.count(line) == 1
        source = source.replace(line, line.replace("12288", "128").replace("3072", "32"))
    exec(source, scope)
    return scope[function.__name__]


def _load(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    spelled: Callable[[str], str] = lambda name: name if name in own else name.removeprefix("text_model.")  # noqa: E731
    state = {spelled(name): tensor for name, tensor in tensors.items() if "position_ids" not in name}
    model.load_state_dict(state | {name: own[name] for name in own.keys() - state.keys() if "position_ids" in name})
