"""Slices of fused weights: the projections that a model has only as rows of one weight, under names of their own.

GPT-2 stores q, k and v in `attn.c_attn`; `attn.q_proj` (or `attn.query`, `attn.q`) is then a slice of it. `resolve`
says where a slice's outputs lie, this says which slices there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.naming.wrappers import FUSIONS, Fusion
from loratools.storage.codecs.turned import CONV1D

_CROSS = ("crossattention", "cross_attention")  # GPT-2's has k and v alone in its c_attn


@dataclass(frozen=True, slots=True)
class Slice:
    """A projection inside a fused weight: its `path` among a model's modules, the `fused` module's, its number there.

    `shape` is (out, in) of the projection, as a linear layer of its own would have it; None where the model's config
    does not tell in which order the projections lie.
    """

    path: str
    fused: str
    number: int
    shape: tuple[int, int] | None


def slices(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Iterator[Slice]:
    """Yield every slice of every fused weight of a model, under each name that it can have, the usual one first.

    `shapes` are the model's parameters, `config` its config.json.
    """
    for tensor, shape in shapes.items():
        if not tensor.endswith(".weight") or len(shape) != 2:
            continue
        fused = tensor.removesuffix(".weight")
        parent, _, last = fused.rpartition(".")
        if parent.rpartition(".")[2] in _CROSS:
            continue
        for fusion in (fusion for fusion in FUSIONS if fusion.fused == last):
            sides = shape[::-1] if last in CONV1D.get(str(config.get("model_type")), ()) else shape
            sizes = _sizes(fusion, sides, config)
            for i, aliases in enumerate(fusion.parts):
                own = (sizes[i], sides[1]) if sizes else None
                yield from (Slice(f"{parent}.{alias}".removeprefix("."), fused, i, own) for alias in aliases)


def _sizes(fusion: Fusion, sides: tuple[int, ...], config: Mapping[str, Any]) -> list[int] | None:
    """Return the output features of each part, or None where they cannot be told."""
    total, width = sides
    count = len(fusion.parts)
    model_type = config.get("model_type")
    if fusion.models is not None and model_type not in fusion.models | fusion.by_head:
        return None
    if count == 2:
        return None if total % 2 else [total // 2] * 2
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if model_type not in fusion.by_head and isinstance(heads, int) and isinstance(groups, int) and heads > 0 < groups:
        size, rest = divmod(total, heads + 2 * groups)
        return None if rest else [heads * size, groups * size, groups * size]
    return [width] * count if total == count * width else None
