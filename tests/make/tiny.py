"""Tiny models and adapters in the layouts of transformers and PEFT, written without loratools: a few kilobytes each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 64, 96, 128, 4, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Linear layers of a Llama block: (out, in)."""


def llama_weights(layers: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights under Llama's names, head and embeddings untied."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    weights = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        weights |= {f"{block}.{name}.weight": random(*shape) for name, shape in SHAPES.items()}
        weights[f"{block}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        weights[f"{block}.post_attention_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    return weights | {
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }


def save_llama(folder: Path, weights: Mapping[str, Tensor], shards: int = 2) -> Path:
    """Write a model as transformers does: config.json, and one file, or several with an index."""
    folder.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(weights)
    parts = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def lora_factors(
    targets: Iterable[str] = ("self_attn.q_proj", "self_attn.v_proj"), layers: int = 2, rank: int = 4, seed: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random float32 factors A (r, in) and B (out, r) by module path."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(layers):
        for target in targets:
            out, inner = SHAPES[target]
            A = torch.randn(rank, inner, generator=generator) * 0.1
            B = torch.randn(out, rank, generator=generator) * 0.1
            factors[f"model.layers.{layer}.{target}"] = (A, B)
    return factors


def save_peft(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float = 8,
    base: str | None = "tiny-llama",
    **settings: object,
) -> Path:
    """Write a LoRA adapter as PEFT does: adapter_config.json beside adapter_model.safetensors."""
    folder.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": alpha, "lora_dropout": 0.0,
        "modules_to_save": None, "r": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings, indent=2))
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged_weights(
    weights: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float
) -> dict[str, Tensor]:
    """Return W + s·B·A, in float64 and rounded once to W's dtype; all other tensors as they are."""
    merged = dict(weights)
    for module, (A, B) in factors.items():
        W = weights[f"{module}.weight"]
        merged[f"{module}.weight"] = (W.double() + scaling * (B.double() @ A.double())).to(W.dtype)
    return merged


def tuned_weights(weights: Mapping[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Return a full fine-tune: a falling spectrum on every linear layer, other norms, the same embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    tuned = dict(weights)
    for name, W in weights.items():
        if ".layers." in name and W.ndim == 2:
            scales = 0.02 * torch.arange(1, 17).float() ** -1.0
            left = torch.randn(W.shape[0], 16, generator=generator) * scales
            tuned[name] = (W.float() + left @ torch.randn(16, W.shape[1], generator=generator)).to(W.dtype)
        elif W.ndim == 1:
            tuned[name] = (W.float() * (1 + 0.05 * torch.randn(W.shape, generator=generator))).to(W.dtype)
    return tuned
