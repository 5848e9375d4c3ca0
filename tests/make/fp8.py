"""Models in FP8 with scales by block, quantized by their formula: transformers' fine-grained FP8 as it is on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.make import tiny

STATED = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


def blocks(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes and one scale for each 128 × 128 block: max|block|/448, 1 for zeros."""
    rows, columns = W.shape
    scale = torch.ones(-(-rows // 128), -(-columns // 128))
    codes = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = W[block].abs().max() / 448 or 1
            codes[block] = (W[block] / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def decoded(tensors: Mapping[str, Tensor], path: str) -> Tensor:
    """Return q · scale of a module in float64."""
    q, scale = tensors[f"{path}.weight"].double(), tensors[f"{path}.weight_scale_inv"].double()
    return q * scale.repeat_interleave(128, 0)[: len(q)].repeat_interleave(128, 1)[:, : q.shape[1]]


def quantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model with its linear layers in FP8."""
    tensors: dict[str, Tensor] = {}
    for name, W in weights.items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = blocks(W.float())
        else:
            tensors[name] = W
    return tensors


def save_llama(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write the tiny Llama in FP8, with config.json's statement; in one file."""
    tiny.save_llama(folder, weights, shards=1)
    from safetensors.torch import save_file

    save_file(quantized(weights), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": STATED}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
