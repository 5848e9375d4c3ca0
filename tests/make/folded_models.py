"""A tiny model folded as AutoAWQ's `scale.py` does it, and quantized in AWQ's packing; what an adapter should do to it.

Scales s = exp(0.35·N) divide a norm, or rows of the linear layer before, and multiply the columns behind. The truth is
the quantized model with its scales taken out again: there ΔW of an adapter of the original is added as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # autoawq, WQLinear_GEMM.from_linear: the column that nibble i holds
FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
SMOOTHED = (FOLDS[0], FOLDS[2])
LINEARS = [name for _, into in FOLDS for name in into]


@dataclass(frozen=True)
class Folded:
    """The original's folder and weights, the folded base's folder, and its weights with the scales taken out."""

    original: Path
    weights: Weights
    base: Path
    unfolded: Weights


def llama(
    folder: Path, *, kv_heads: int = 4, hidden: int = 128, dtype: torch.dtype = torch.float16, family: str = "Llama"
) -> Weights:
    """Write a random model of two layers, of a family named as Llama names its modules; return its weights."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=hidden // 4, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = (family == "Llama") + 0.3 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def fold(
    weights: Mapping[str, Tensor], folds: Any = FOLDS, shift: float = 0.0, seed: int = 7
) -> tuple[Weights, dict[str, Tensor]]:
    """Return weights in float64 with scales folded in, norms in their dtype, and source -> the scales as stored."""
    generator = torch.Generator().manual_seed(seed)
    made, scales = {name: weight.double() for name, weight in weights.items()}, {}
    for layer in range(2):
        start = f"model.layers.{layer}."
        for source, into in folds:
            name = f"{start}{source}.weight"
            count = weights[f"{start}{into[0]}.weight"].shape[1]
            if len(weights[name]) != count:
                continue
            s = torch.exp(0.35 * torch.randn(count, generator=generator, dtype=torch.float64))
            if weights[name].ndim == 1:
                stored = ((weights[name].double() + shift) / s - shift).to(weights[name].dtype)
                made[name], s = stored.double(), (weights[name].double() + shift) / (stored.double() + shift)
            else:
                made[name] /= s[:, None]
            scales[f"{start}{source}"] = s
            for each in into:
                made[f"{start}{each}.weight"] *= s
    return made, scales


def quantize(W: Tensor, group: int = 32) -> tuple[Weights, Tensor]:
    """Return the parts of a weight as AWQ's GEMM packs them, asymmetric 4 bit, and what they stand for in float64."""
    out, inner = W.shape
    grouped = W.reshape(out, -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low).clamp(min=1e-5) / 15).half()
    zero = (-low / scale.double()).round().clamp(0, 15)
    q = ((grouped / scale.double()[..., None]).round() + zero[..., None]).clamp(0, 15)
    numbers = ((q - zero[..., None]) * scale.double()[..., None]).reshape(out, inner)
    parts = {
        "qweight": pack(q.reshape(out, inner).T), "qzeros": pack(zero.T), "scales": scale.T.contiguous(),
    }  # fmt: skip
    return parts, numbers


def pack(codes: Tensor) -> Tensor:
    """Pack eight columns of codes in a word of 32 bits, in AWQ's order."""
    eights = codes.long().reshape(len(codes), -1, 8)
    words = torch.stack([eights[:, :, column] << 4 * i for i, column in enumerate(ORDER)]).sum(0)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def awq(folder: Path, weights: Mapping[str, Tensor], folds: Any = FOLDS, shift: float = 0.0) -> Folded:
    """Write the model at `original`, folded and quantized, as `base`; `shift` is 1 where norms multiply by 1 + w."""
    stated = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    return _save(folder, weights, folds, shift, quantize, stated)


def smoothquant(folder: Path, weights: Mapping[str, Tensor]) -> Folded:
    """Write it as llm-compressor's SmoothQuant does: int8 by channel in compressed-tensors, with its recipe beside."""
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": scheme, "format": None}
    stated = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    made = _save(folder, weights, SMOOTHED, 0.0, quantize_rows, stated)
    recipe = "default_stage:\n  default_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n"
    (made.base / "recipe.yaml").write_text(recipe)
    return made


def quantize_rows(W: Tensor) -> tuple[Weights, Tensor]:
    """Return the parts of a weight in symmetric int8 with a scale for each row, and what they stand for in float64."""
    scale = (W.abs().amax(1, keepdim=True) / 127).float()
    q = (W / scale.double()).round().clamp(-127, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale.double()


def _save(
    folder: Path, weights: Mapping[str, Tensor], folds: Any, shift: float,
    quantize: Callable[[Tensor], tuple[Weights, Tensor]], stated: Mapping[str, Any],
) -> Folded:  # fmt: skip
    original = folder / "original"
    made, scales = fold(weights, folds, shift)
    stored, unfolded = {}, {name: weight.double() for name, weight in weights.items()}
    for name, weight in made.items():
        path = name.removesuffix(".weight")
        if path.partition("layers.")[2].partition(".")[2] not in LINEARS:
            stored[name] = weight.to(weights[name].dtype)
            continue
        parts, numbers = quantize(weight)
        stored |= {f"{path}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        unfolded[name] = _taken_out(path, numbers, scales, folds)
    config = json.loads((original / "config.json").read_text()) | {"quantization_config": stated}
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    return Folded(original, dict(weights), base, unfolded)


def _taken_out(path: str, W: Tensor, scales: Mapping[str, Tensor], folds: Any) -> Tensor:
    start, _, end = path.partition("layers.")
    layer = f"{start}layers.{end.partition('.')[0]}."
    for source, into in folds:
        if path.removeprefix(layer) in into and f"{layer}{source}" in scales:
            W = W / scales[f"{layer}{source}"]
    return W * scales[path][:, None] if path in scales else W


def logits(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the logits of random tokens, in float64, of a model in a folder, or of other weights in its class."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if weights is not None:
        model.load_state_dict({name: weight.double() for name, weight in weights.items()})
    with torch.no_grad():
        result: Tensor = model.eval()(tokens()).logits
    return result


def tokens() -> Tensor:
    """Return two rows of random tokens."""
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def adapter(folder: Path, modules: list[str], weights: Mapping[str, Tensor], size: float = 0.02) -> Weights:
    """Write a PEFT LoRA of these modules, ‖ΔW‖ = size·‖W‖; return ΔW in float64 by weight."""
    generator = torch.Generator().manual_seed(11)
    tensors, deltas = {}, {}
    for layer in range(2):
        for end in modules:
            path = f"model.layers.{layer}.{end}"
            W = weights[f"{path}.weight"].double()
            A = torch.randn(4, W.shape[1], generator=generator)
            B = torch.randn(W.shape[0], 4, generator=generator)
            B *= size * W.norm() / (2 * (B.double() @ A.double()).norm())
            tensors[f"base_model.model.{path}.lora_A.weight"], tensors[f"base_model.model.{path}.lora_B.weight"] = A, B
            deltas[f"{path}.weight"] = 2 * (B.double() @ A.double())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted({end.rpartition(".")[2] for end in modules}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas
