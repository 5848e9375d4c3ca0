"""Megatron's names of a layer's parts, and the rows of those that it fuses.

    linear_qkv   g groups of rows, each of one key head: (heads/g query heads, its key head, its value head)
    linear_fc1   [gate; up], or up alone where the model has no gate
    linear_proj, linear_fc2   as in transformers: o_proj, down_proj

A fused projection comes apart by rows of linear_out (and of DoRA's magnitude); linear_in serves all of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter import factors
from loratools.storage.lazy import LazyTensor

_NAME = re.compile(
    r"(?:(?:model|module)\.)*(?:decoder\.|language_model\.encoder\.)?layers\.(\d+)\."
    r"(self_attention|mlp)\.(.+)\.(linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
# What stands in a name between the block and the factor: in NeMo 1.x, and in Megatron-Bridge and NeMo 2.
QKV, FC1 = "qkv", "fc1"
_PARTS: Mapping[tuple[str, str], str] = {
    ("self_attention", "adapter_layer.lora_kqv_adapter"): QKV,
    ("self_attention", "linear_qkv.adapter"): QKV,
    ("self_attention", "adapter_layer.lora_dense_attention_adapter"): "o_proj",
    ("self_attention", "linear_proj.adapter"): "o_proj",
    ("mlp", "adapter_layer.lora_hto4h_adapter"): FC1,
    ("mlp", "linear_fc1.adapter"): FC1,
    ("mlp", "adapter_layer.lora_4htoh_adapter"): "down_proj",
    ("mlp", "linear_fc2.adapter"): "down_proj",
    **{("self_attention", f"adapter_layer.lora_unfused_kqv_adapter.{x}_adapter"): f"{x}_proj" for x in "qkv"},
    **{("self_attention", f"linear_qkv.adapter.adapter_{x}"): f"{x}_proj" for x in "qkv"},
    **{("self_attention", f"linear_qkv.adapter_{x}"): f"{x}_proj" for x in "qkv"},
    **{("mlp", f"adapter_layer.lora_unfused_hto4h_adapter.{x}_adapter"): f"{x}_proj" for x in ("gate", "up")},
    **{("mlp", f"linear_fc1.adapter.adapter_{x}"): f"{x}_proj" for x in ("gate", "up")},
    **{("mlp", f"linear_fc1.adapter_{x}"): f"{x}_proj" for x in ("gate", "up")},
}
_HOMES = {"self_attention": "self_attn", "mlp": "mlp"}


def place(name: str) -> tuple[str, str, str] | None:
    """Return where a tensor belongs: the block of transformers' model, the projection (perhaps fused), the factor.

    None for a name that Megatron does not give to adapters of known layers.

    >>> place("module.decoder.layers.3.self_attention.linear_qkv.adapter.linear_in.weight")
    ('model.layers.3.self_attn', 'qkv', 'linear_in.weight')
    """
    match = _NAME.fullmatch(name)
    projection = _PARTS.get((match[2], match[3])) if match else None
    return (f"model.layers.{match[1]}.{_HOMES[match[2]]}", projection, match[4]) if match and projection else None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a reader needs to know of a model to take its fused projections apart; None where it is not known."""

    heads: int | None = None
    groups: int | None = None
    head: int | None = None
    gated: bool | None = None

    def apart(self, projection: str, lazy: LazyTensor) -> dict[str, LazyTensor]:
        """Return the rows of each projection in one that may be fused.

        Raises `LookupError` where the model is not known well enough, `ValueError` where the rows do not fit it.
        """
        if projection not in (QKV, FC1):
            return {projection: lazy}
        return self._qkv(lazy) if projection == QKV else self._fc1(lazy)

    def _qkv(self, lazy: LazyTensor) -> dict[str, LazyTensor]:
        if self.heads is None or self.groups is None:
            raise LookupError("query, key and value are interleaved by groups of heads, and how many is not known")
        rows, rest = lazy.shape[0], lazy.shape[1:]
        slots, each = self.heads + 2 * self.groups, self.heads // self.groups
        size = self.head or rows // slots
        if self.heads % self.groups or rows != slots * size:
            stated = f"{self.heads} heads in {self.groups} groups" + (f", of {self.head} features" if self.head else "")
            raise ValueError(f"{rows} rows are not those of {stated}")
        sides = (self.groups, each + 2, size, *rest)
        spans = {"q_proj": (0, each), "k_proj": (each, each + 1), "v_proj": (each + 1, each + 2)}
        return {name: _taken(lazy, sides, *span) for name, span in spans.items()}

    def _fc1(self, lazy: LazyTensor) -> dict[str, LazyTensor]:
        if self.gated is None:
            raise LookupError("whether linear_fc1 is a gate and an up projection, or the latter alone, is not known")
        if not self.gated:
            return {"up_proj": lazy}
        half, odd = divmod(lazy.shape[0], 2)
        if odd:
            raise ValueError(f"{lazy.shape[0]} rows are not those of a gate and an up projection")
        return {"gate_proj": factors.rows(lazy, 0, half), "up_proj": factors.rows(lazy, half, 2 * half)}


def _taken(lazy: LazyTensor, sides: tuple[int, ...], start: int, stop: int) -> LazyTensor:
    """Return slots [start, stop) of every group, as rows."""
    groups, _, size, *rest = sides
    shape = (groups * (stop - start) * size, *rest)

    def change(tensor: Any) -> Any:
        return tensor.reshape(sides)[:, start:stop].reshape(shape).contiguous()

    return lazy.map(change, shape)
