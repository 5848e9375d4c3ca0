"""llama.cpp's architectures: which models they are, which of their tensors are what, and where rows are permuted.

RoPE turns pairs of neighbouring rows of q and k in some of llama.cpp's architectures. For those its converter permutes
the rows of transformers' weights (`LlamaModel.undo_permute`), and so the rows of lora_B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "granite": "granite", "smollm3": "smollm3",
    "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "phi3": "phi3", "olmo2": "olmo2",
}  # fmt: skip
"""transformers' model_type -> `general.architecture`."""

PERMUTED = frozenset({"llama", "granite", "smollm3"})
"""Architectures with RoPE over neighbouring rows."""

_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_PHI3 = {"ffn_up": "mlp.gate_up_proj"}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_MIXTRAL = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
_WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_EXPERT = re.compile(r"(?:.+\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_LAYER = re.compile(r"(?:model\.|language_model\.|text_model\.)*layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the base in a GGUF file; of a stack of experts, also the number of one."""

    tensor: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What a reader needs to know of a base: its architecture, and its heads where rows are permuted."""

    architecture: str
    heads: int | None = None
    kv_heads: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Layout | None:
        """Read it from a config.json, or from its part for the text model; None for an unknown model."""
        inner = config.get("text_config")
        config = {**config, **inner} if isinstance(inner, Mapping) else config
        architecture = ARCHITECTURES.get(str(config.get("model_type")))
        heads = config.get("num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        numbers = [number if isinstance(number, int) and number > 0 else None for number in (heads, kv_heads)]
        return cls(architecture, *numbers) if architecture else None

    def heads_of(self, tensor: str) -> int | None:
        """Return by how many heads a tensor's rows are permuted; None where they keep their order.

        Raises `ValueError` where they are permuted and the number of heads is not known.
        """
        name = tensor.rpartition(".")[2]
        if self.architecture not in PERMUTED or name not in ("attn_q", "attn_k"):
            return None
        heads = self.heads if name == "attn_q" else self.kv_heads
        if heads is None:
            raise ValueError(f"the rows of {tensor} are permuted by heads, and their number is not known")
        return heads


def permuted(lazy: LazyTensor, heads: int | None, *, back: bool = False) -> LazyTensor:
    """Return B with the rows of each head in pairs, as llama.cpp has them; with `back`, in transformers' halves again.

    `heads` is the number of heads, None for rows that keep their order. Raises `ValueError` where the rows are
    not those of so many heads.
    """
    if heads is None:
        return lazy
    out, rank = lazy.shape
    if heads < 1 or out % heads or out // heads % 2:
        raise ValueError(f"{out} output features are not those of {heads} heads")
    sides = (heads, out // heads // 2, 2, rank) if back else (heads, 2, out // heads // 2, rank)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(sides).transpose(1, 2).reshape(out, rank).contiguous()

    return lazy.map(change, lazy.shape)


def place(module: str, architecture: str) -> Place | None:
    """Return where llama.cpp has a module of transformers, or None.

    >>> place("model.layers.3.mlp.experts.5.up_proj", "qwen3moe")
    Place(tensor='blk.3.ffn_up_exps', expert=5)
    """
    expert, layer = _EXPERT.fullmatch(module), _LAYER.fullmatch(module)
    if match := expert or layer:
        name = match[3] if expert else match[2]
        tensors = (tensor for tensor, known in _names(architecture, bool(expert)).items() if known == name)
        return next((Place(f"blk.{match[1]}.{tensor}", int(match[2]) if expert else None) for tensor in tensors), None)
    last = module.rpartition(".")[2]
    return next((Place(tensor) for tensor, name in _WHOLE.items() if last == name.rpartition(".")[2]), None)


def module_of(tensor: str, architecture: str, expert: int | None = None) -> str | None:
    """Return transformers' usual name of a tensor in a GGUF file, or of one expert in it; None if it has none."""
    if tensor in _WHOLE:
        return _WHOLE[tensor]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", tensor)
    name = _names(architecture, expert is not None).get(match[2]) if match else None
    if match is None or name is None:
        return None
    home = "block_sparse_moe" if architecture == "llama" else "mlp"
    return f"model.layers.{match[1]}." + (name if expert is None else f"{home}.experts.{expert}.{name}")


def _names(architecture: str, experts: bool) -> Mapping[str, str]:
    """Return tensor -> module of a layer's own projections, or of those of one expert in it."""
    if experts:
        return _MIXTRAL if architecture == "llama" else _EXPERTS
    return _BLOCK | _PHI3 if architecture == "phi3" else _BLOCK
