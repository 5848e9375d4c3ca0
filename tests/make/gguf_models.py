"""A tiny Llama as llama.cpp's converter writes it: names, rows of q and k in pairs, any type, by gguf's writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.make import tiny

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(name: str) -> str:
    """Return llama.cpp's name of a tensor of transformers' Llama."""
    module, _, parameter = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{parameter}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{parameter}"


def permuted(W: Tensor, heads: int) -> Tensor:
    """Return rows of each head in pairs: (heads, 2, d/2, …) -> (heads, d/2, 2, …), as the converter has it."""
    return W.reshape(heads, 2, len(W) // heads // 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape).contiguous()


def in_file_order(name: str, W: Tensor) -> Tensor:
    """Return a weight with its rows as they are in the file."""
    heads = {"q_proj": tiny.HEADS, "k_proj": tiny.KV_HEADS}.get(name.split(".")[-2])
    return permuted(W, heads) if heads else W


def save_llama(path: Path, weights: Mapping[str, Tensor], kind: str = "Q8_0", architecture: str = "llama") -> Path:
    """Write a Llama; linear layers and embeddings in ggml's type `kind`, norms in F32."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(tiny.HIDDEN)
    writer.add_feed_forward_length(tiny.INTERMEDIATE)
    writer.add_head_count(tiny.HEADS)
    writer.add_head_count_kv(tiny.KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(7)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(tiny.VOCABULARY)])
    writer.add_token_scores([0.0] * tiny.VOCABULARY)
    for name, W in weights.items():
        array: Any = in_file_order(name, W.float()).numpy()
        if array.ndim < 2:
            writer.add_tensor(name_of(name), array.astype(np.float32))
            continue
        ggml = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name_of(name), array.astype({"F32": np.float32, "F16": np.float16}[kind]))
        else:
            writer.add_tensor(name_of(name), gguf.quants.quantize(array, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Return (type, numbers in float32) of each tensor, by gguf's own reader and formulas."""
    import gguf

    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(side) for side in reversed(tensor.shape))
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        tensors[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(values))
    return tensors
