"""Files as ComfyUI has them: a Flux-like model in FP8, in every way of saying so, and a kohya LoRA for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "model.diffusion_model."
WIDTH = 32
SHAPES = {
    "img_attn.qkv": (3 * WIDTH, WIDTH), "img_attn.proj": (WIDTH, WIDTH), "img_mlp.0": (4 * WIDTH, WIDTH),
    "img_mlp.2": (WIDTH, 4 * WIDTH), "img_mod.lin": (6 * WIDTH, WIDTH),
}  # fmt: skip
CHANGED = {f"double_blocks.{block}.{name}": SHAPES[name] for block, name in ((0, "img_attn.qkv"), (1, "img_mlp.2"))}

Weights = dict[str, torch.Tensor]


def weights() -> Weights:
    """Return the numbers: linear layers in float32, the others in bf16."""
    generator = torch.Generator().manual_seed(2)
    made = {f"{PREFIX}img_in.weight": torch.randn(WIDTH, 16, generator=generator).bfloat16()}
    for block in range(2):
        for name, shape in SHAPES.items():
            path = f"{PREFIX}double_blocks.{block}.{name}"
            made[f"{path}.weight"] = torch.randn(shape, generator=generator) / 30
            made[f"{path}.bias"] = torch.randn(shape[0], generator=generator).bfloat16()
        made[f"{PREFIX}double_blocks.{block}.img_attn.norm.query_norm.scale"] = torch.rand(
            8, generator=generator
        ).bfloat16()
    return made


def scaled(path: Path, how: str, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Weights, Weights]:
    """Write the model in scaled FP8, said as `how` has it: "old", "tensors", "header"; return it, and its numbers.

    A scale is max/448 and its layer in float64 is code · scale, which is what ComfyUI's TensorCoreFP8Layout has.
    """
    stored: Weights = {}
    numbers: Weights = {}
    layers: dict[str, Any] = {}
    form = {"format": str(dtype).removeprefix("torch.")}
    for name, W in weights().items():
        stored[name] = W
        numbers[name] = W.double()
        if W.dtype != torch.float32:
            continue
        layer = name.removesuffix(".weight")
        scale = W.abs().max() / torch.finfo(dtype).max
        stored[name] = (W / scale).to(dtype)
        numbers[name] = stored[name].double() * scale.double()
        weight_scale, input_scale = ("scale_weight", "scale_input") if how == "old" else ("weight_scale", "input_scale")
        stored |= {f"{layer}.{weight_scale}": scale, f"{layer}.{input_scale}": torch.tensor(0.5)}
        layers[layer] = form
        if how == "tensors":
            text = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
            stored[f"{layer}.comfy_quant"] = text
    if how == "old":
        stored[f"{PREFIX}scaled_fp8"] = torch.zeros(2).to(dtype)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, path, {"modelspec.title": "a model", **(header if how == "header" else {})})
    return stored, numbers


def cast(path: Path, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Write the model cast to FP8, every tensor; return it, and its numbers."""
    stored = {name: W.to(dtype) for name, W in weights().items()}
    save_file(stored, path)
    return stored, {name: q.double() for name, q in stored.items()}


def lora(path: Path, rank: int = 3) -> Weights:
    """Write a kohya LoRA; return its ΔW in float64 by the weight's name in the file."""
    generator = torch.Generator().manual_seed(3)
    factors, deltas = {}, {}
    for module, (rows, columns) in CHANGED.items():
        A, B = torch.randn(rank, columns, generator=generator) / 9, torch.randn(rows, rank, generator=generator) / 9
        name = f"lora_unet_{module.replace('.', '_')}"
        factors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        factors[f"{name}.alpha"] = torch.tensor(2.0 * rank)
        deltas[f"{PREFIX}{module}.weight"] = 2 * (B.double() @ A.double())
    save_file(factors, path)
    return deltas
