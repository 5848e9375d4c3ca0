"""llama.cpp's architectures: which models they are, which of their tensors are what, and the order of their rows.

The converter keeps every number of a weight, and puts the rows of some in another order (`llama_cpp_table.py`): so with
the rows of lora_B, and of every ΔW.

    pairs    RoPE turns pairs of neighbouring rows of q and k: row j of half a of head h is row h·d + 2·j + a
    groups   query_key_value of Bloom, Falcon and GPT-NeoX has q…, k, v of each group of heads, the file has all q, all
             k, all v
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter.naming.llama_cpp_table import GROUPS, PAIRS, TABLE, Architecture
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

ARCHITECTURES: Mapping[str, str] = {model: name for name, known in TABLE.items() for model in known.models}
"""transformers' model_type -> `general.architecture`."""

_EXPERT = re.compile(r"(?:.+\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_WRAPPERS = r"(?:(?:model|language_model|text_model|transformer|gpt_neox|thinker)\.)*"
_TO_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_SAME_HOME = {"mlp.": "block_sparse_moe.", "block_sparse_moe.": "mlp."}

Piece = tuple[tuple[int, int], tuple[int, int, int]]
"""Rows of a module (start, stop), and the rows of the tensor where they are (start, stop, step)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the base in a GGUF file; of a stack of experts, also the number of one."""

    tensor: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a tensor's rows: its kind, the heads, and of groups those of k and v."""

    kind: str
    heads: int
    kv_heads: int = 0

    def pieces(self, rows: int) -> list[Piece]:
        """Return where a module's rows are in the tensor; raise `ValueError` where they are not those of the heads."""
        return list(_ORDERS[self.kind](rows, self))


def _pairs(rows: int, order: Order) -> Iterator[Piece]:
    if order.heads < 1 or rows % (2 * order.heads):
        raise ValueError(f"{rows} output features are not those of {order.heads} heads")
    size = rows // order.heads
    for first in range(0, rows, size):
        for half in (0, 1):
            start = first + half * size // 2
            yield (start, start + size // 2), (first + half, first + size - 1 + half, 2)


def _groups(rows: int, order: Order) -> Iterator[Piece]:
    heads, groups = order.heads, order.kv_heads
    if heads < 1 or groups < 1 or heads % groups or rows % (heads + 2 * groups):
        raise ValueError(f"{rows} output features are not those of {heads} heads in {groups} groups")
    size = rows // (heads + 2 * groups)
    of_q = heads // groups * size
    at = 0
    for group in range(groups):
        starts = (group * of_q, (heads + group) * size, (heads + groups + group) * size)
        for start, count in zip(starts, (of_q, size, size), strict=True):
            yield (at, at + count), (start, start + count, 1)
            at += count


_ORDERS: Mapping[str, Callable[[int, Order], Iterator[Piece]]] = {PAIRS: _pairs, GROUPS: _groups}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a reader needs to know of a base: its architecture, and its heads where rows have another order."""

    architecture: str
    heads: int | None = None
    kv_heads: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Layout | None:
        """Read it from a config.json, or from its part for the text model; None for an unknown model.

        A config of a GGUF file has its fields under `gguf`.
        """
        if isinstance(stated := config.get("gguf"), Mapping):
            known = stated.get("architecture") in TABLE
            return cls(str(stated["architecture"]), stated.get("heads"), stated.get("kv_heads")) if known else None
        inner = config.get("text_config")
        config = {**config, **inner} if isinstance(inner, Mapping) else config
        architecture = ARCHITECTURES.get(str(config.get("model_type")))
        heads = config.get("num_attention_heads", config.get("n_head"))
        kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
        if config.get("multi_query") is True and config.get("new_decoder_architecture") is not True:
            kv_heads = 1
        numbers = [number if isinstance(number, int) and number > 0 else None for number in (heads, kv_heads)]
        return cls(architecture, *numbers) if architecture else None

    def order_of(self, tensor: str) -> Order | None:
        """Return the order of a tensor's rows; None where they keep transformers' own.

        Raises `ValueError` where they have another, and the number of heads is not known.
        """
        name = tensor.rpartition(".")[2]
        kind = TABLE[self.architecture].rows.get(name)
        if kind is None:
            return None
        heads = self.kv_heads if name == "attn_k" else self.heads
        if heads is None or (kind == GROUPS and self.kv_heads is None):
            raise ValueError(f"the rows of {tensor} are permuted by heads, and their number is not known")
        return Order(kind, heads, self.kv_heads or 0)


def permuted(lazy: LazyTensor, order: Order | None, *, back: bool = False) -> LazyTensor:
    """Return a matrix with its rows as llama.cpp has them; with `back`, in transformers' order again.

    `order` is None for rows that keep their order. Raises `ValueError` where the rows are not those of its heads.
    """
    if order is None:
        return lazy
    pieces = order.pieces(lazy.shape[0])

    def change(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        changed = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for (start, stop), (first, last, step) in pieces:
            if back:
                changed[start:stop] = tensor[first:last:step]
            else:
                changed[first:last:step] = tensor[start:stop]
        return changed

    return lazy.map(change, lazy.shape)


def place(module: str, architecture: str) -> Place | None:
    """Return where llama.cpp has a module of transformers, or None.

    >>> place("model.layers.3.mlp.experts.5.up_proj", "qwen3moe")
    Place(tensor='blk.3.ffn_up_exps', expert=5)
    """
    known = TABLE[architecture]
    if match := _EXPERT.fullmatch(module):
        stack = known.experts.get(match[3]) or known.experts.get(_TO_MIXTRAL.get(match[3], ""))
        return Place(f"blk.{match[1]}.{stack}", int(match[2])) if stack else None
    if inside := _in_layer(module, known):
        prefix, number, name, modules = inside
        tensor = next((modules[each] for each in _spellings(name) if each in modules), None)
        return Place(f"{prefix}.{number}.{tensor}") if tensor else None
    last = module.rpartition(".")[2]
    bare = re.fullmatch(rf"{_WRAPPERS}{re.escape(last)}", module)
    return next((Place(t) for name, t in known.whole.items() if bare and last == name.rpartition(".")[2]), None)


def refusal(module: str, architecture: str) -> str | None:
    """Return why no update of a module lands in a GGUF file, where the converter changes more than rows' order."""
    inside = _in_layer(module, TABLE[architecture])
    refused = TABLE[architecture].refused.items() if inside else ()
    return next((why for name, why in refused if inside and re.fullmatch(name, inside[2])), None)


def whole_refusal(tensor: str, parameter: str, architecture: str) -> str | None:
    """Return why a tensor trained whole cannot take the place of one in a GGUF file, or None."""
    known, name = TABLE[architecture], tensor.rpartition(".")[2]
    if name in known.rows:
        return "the converter puts its rows in another order"
    return known.norms if known.norms and name.endswith("norm") and parameter == "weight" else None


def module_of(tensor: str, architecture: str, expert: int | None = None) -> str | None:
    """Return transformers' usual name of a tensor in a GGUF file, or of one expert in it; None if it has none."""
    known = TABLE[architecture]
    if expert is not None:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", tensor)
        name = next((own for own, stack in known.experts.items() if match and stack == match[2]), None)
        return f"{known.layers}.{match[1]}.{known.home}.experts.{expert}.{name}" if match and name else None
    if name := next((own for own, whole in known.whole.items() if whole == tensor), None):
        return name
    for path, (prefix, modules) in known.kinds_of_layers().items():
        if match := re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", tensor):
            name = next((own for own, stored in modules.items() if stored == match[2]), None)
            return f"{path}.{match[1]}.{name}" if name else None
    return None


def model_type(architecture: str, *, experts: bool) -> str:
    """Return transformers' model type of an architecture, the first of several: of `llama` with experts Mixtral's."""
    return "mixtral" if architecture == "llama" and experts else TABLE[architecture].models[0]


def _in_layer(module: str, known: Architecture) -> tuple[str, str, str, Mapping[str, str]] | None:
    """Return (the tensors' prefix, the layer's number, the module within it, the layer's modules), or None."""
    for path, (prefix, modules) in known.kinds_of_layers().items():
        own = path if known.blocks else path.rpartition(".")[2]
        if match := re.fullmatch(rf"{_WRAPPERS}{re.escape(own)}\.(\d+)\.(.+)", module):
            return prefix, match[1], match[2], modules
    return None


def _spellings(name: str) -> Iterator[str]:
    """Yield a module's name in its layer, and that before or after the renaming of transformers 5."""
    yield name
    for old, new in _SAME_HOME.items():
        if name.startswith(old):
            yield new + name.removeprefix(old)
