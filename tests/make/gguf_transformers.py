"""Tiny models of transformers as llama.cpp's converter writes them, architecture by architecture, to judge by.

Names are those of gguf's own map. What the converter does to numbers is said here once more, in its own way: `logits`
of llama.cpp and of transformers are the same for these files, so that it is said right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.make import llama

QUANTIZED_BY_GGUF = ("F16", "Q4_0", "Q8_0")
HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE, VOCABULARY = 64, 4, 2, 2, 96, 128

_LLAMA = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS,
    "intermediate_size": WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_GPT = {
    "n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": VOCABULARY, "n_positions": 64,
    "n_inner": 4 * HIDDEN, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

Numbers = Callable[[Tensor, Any], Tensor]


def _pairs(W: Tensor, heads: int) -> Tensor:
    return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _one_added(W: Tensor, config: Any) -> Tensor:
    return W + 1


def _turned(W: Tensor, config: Any) -> Tensor:
    return W.T


def _apart(W: Tensor, config: Any) -> Tensor:
    """Return q of all heads, then k, then v: (groups, q… k v, size) by groups."""
    heads = config.num_attention_heads
    groups = {"falcon": lambda: config.num_kv_heads}.get(config.model_type, lambda: heads)()
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        groups = 1
    whole = W.unflatten(0, (groups, heads // groups + 2, -1))
    parts = (whole[:, :-2], whole[:, -2:-1], whole[:, -1:])
    return torch.cat([part.flatten(0, 2) for part in parts])


_OF_Q_AND_K: dict[str, Numbers] = {
    r"q_proj\.(weight|bias)": lambda W, config: _pairs(W, config.num_attention_heads),
    r"k_proj\.(weight|bias)": lambda W, config: _pairs(W, config.num_key_value_heads),
}


@dataclass(frozen=True)
class Kind:
    """A model type, its settings, what happens to tensors whose name ends so, and fields beside the usual ones."""

    model_type: str
    config: Mapping[str, Any]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "all-linear"


KINDS: Mapping[str, Kind] = {
    "llama": Kind("llama", _LLAMA | {"attention_bias": True}, _OF_Q_AND_K),
    "mixtral": Kind(
        "mixtral", _LLAMA | _EXPERTS, _OF_Q_AND_K, {"expert_count": 4, "expert_used_count": 2}
    ),
    "granite": Kind(
        "granite", _LLAMA, _OF_Q_AND_K,
        {"attention.scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0},
    ),
    "olmo": Kind("olmo", _LLAMA, _OF_Q_AND_K, {"attention.layer_norm_epsilon": 1e-5}),
    "smollm3": Kind("smollm3", _LLAMA, _OF_Q_AND_K),
    "qwen2": Kind("qwen2", _LLAMA),
    "qwen3": Kind("qwen3", _LLAMA | {"head_dim": 32}),
    "qwen3moe": Kind(
        "qwen3_moe", _LLAMA | _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}, {},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "qwen2moe": Kind(
        "qwen2_moe", _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 64}, {},
        {
            "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "olmo2": Kind("olmo2", _LLAMA),
    "gemma": Kind(
        "gemma", _LLAMA | {"head_dim": 16, "tie_word_embeddings": True}, {r"norm\.weight": _one_added}
    ),
    "phi3": Kind("phi3", _LLAMA | {"original_max_position_embeddings": 64}, {}, {"attention.sliding_window": 0}),
    "phi2": Kind("phi", _LLAMA | {"partial_rotary_factor": 0.5, "num_key_value_heads": HEADS}, {},
                 {"rope.dimension_count": 8, "attention.head_count_kv": HEADS}),
    "starcoder2": Kind("starcoder2", _LLAMA | {"use_bias": True, "sliding_window": None}),
    "stablelm": Kind("stablelm", _LLAMA | {"partial_rotary_factor": 0.5}, {},
                     {"rope.dimension_count": 8, "use_parallel_residual": False}),
    "command-r": Kind(
        "cohere", _LLAMA | {"tie_word_embeddings": True, "logit_scale": 0.25}, {}, {"logit_scale": 0.25}
    ),
    "gpt2": Kind(
        "gpt2", _GPT, {r"(c_attn|c_proj|c_fc)\.weight": _turned},
        {"attention.head_count_kv": HEADS, "feed_forward_length": 4 * HIDDEN}, targets="c_attn c_proj c_fc",
    ),
    "starcoder": Kind(
        "gpt_bigcode", _GPT, {}, {"attention.head_count_kv": 1, "feed_forward_length": 4 * HIDDEN},
    ),
    "gptneox": Kind(
        "gpt_neox", _LLAMA | {"rotary_pct": 0.5}, {r"query_key_value\.(weight|bias)": _apart},
        {"rope.dimension_count": 8, "use_parallel_residual": True, "attention.head_count_kv": HEADS},
    ),
    "bloom": Kind(
        "bloom", _LLAMA | {"n_head": HEADS, "n_layer": LAYERS}, {r"query_key_value\.(weight|bias)": _apart},
        {"attention.head_count_kv": HEADS, "feed_forward_length": 4 * HIDDEN},
    ),
    "falcon": Kind(
        "falcon", _LLAMA | {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "bias": False,
                            "num_kv_heads": 1},
        {r"query_key_value\.weight": _apart}, {"attention.head_count_kv": 1, "feed_forward_length": 4 * HIDDEN},
    ),
}  # fmt: skip
"""Name of a case -> its kind; the architecture is the name, of Mixtral `llama`."""


def model(kind: Kind, seed: int = 0, **config_of: Any) -> Any:
    """Return a tiny model with random weights, biases and norms too; `config_of` has other fields of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind.model_type, **{**kind.config, **config_of})
    config._attn_implementation = "eager"
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(parameter + noise if parameter.ndim == 1 and "norm" in name else noise)
    return made


def save(path: Path, case: str, made: Any, kind: str = "F32") -> Path:
    """Write a model as llama.cpp's converter does: matrices in F32, or in a type that gguf, or else ggml, quantizes."""
    import gguf

    settings, config = KINDS[case], made.config
    architecture = "llama" if case == "mixtral" else case
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "Q6_K": 18}[kind])
    writer.add_quantization_version(2)
    hidden = getattr(config, "hidden_size", HIDDEN)
    size = getattr(config, "head_dim", None) or hidden // HEADS
    usual = {
        "context_length": 64, "embedding_length": hidden, "block_count": LAYERS,
        "feed_forward_length": getattr(config, "intermediate_size", WIDE),
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": size,
        "attention.key_length": size, "attention.value_length": size, "vocab_size": VOCABULARY,
        "attention.layer_norm_rms_epsilon": _epsilon(config), "attention.layer_norm_epsilon": _epsilon(config),
        "rope.freq_base": float((getattr(config, "rope_parameters", None) or {}).get("rope_theta") or 10000.0),
    }  # fmt: skip
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (usual | dict(settings.fields)).items():
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    state = made.state_dict()
    for name, W in _apart_experts(state).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name.removeprefix("transformer."), (".weight", ".bias")) or names.get_name(
            name, (".weight", ".bias")
        )
        if stored is None and name.endswith(("attn.bias", "attn.masked_bias", "inv_freq")):
            continue
        assert stored, name
        for pattern, change in settings.numbers.items():
            if re.search(pattern + "$", name):
                W = change(W, config)
        array: Any = W.float().contiguous().numpy()
        if kind == "F32" or array.ndim < 2 or "position_embd" in stored or "gate_inp" in stored:
            writer.add_tensor(stored, array.squeeze(0) if "gate_inp_shexp" in stored else array)
        else:
            ggml = gguf.GGMLQuantizationType[kind]
            quantize = gguf.quants.quantize if kind in QUANTIZED_BY_GGUF else llama.quantized
            writer.add_tensor(stored, quantize(array, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _apart_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with gate and up of stacked experts as two tensors, as checkpoints have them."""
    tensors: dict[str, Tensor] = {}
    for name, W in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = W.chunk(2, dim=1)
            tensors |= {name.replace("gate_up", half) + ".weight": part for half, part in (("gate", gate), ("up", up))}
        else:
            tensors[name + ".weight" if name.endswith("experts.down_proj") else name] = W
    return tensors


def _epsilon(config: Any) -> float:
    keys = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    return float(next((value for key in keys if (value := getattr(config, key, None)) is not None), 1e-5))


def logits(made: Any, tokens: list[int]) -> Tensor:
    """Return transformers' logits."""
    with torch.no_grad():
        out: Tensor = made(torch.tensor([tokens])).logits[0]
    return out
