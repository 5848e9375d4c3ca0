"""Which parameter each of PEFT's wrappers around a stack of experts is for; the names in a file do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from loratools.adapter.naming.compact import suffixes
from loratools.adapter.parts import A, B
from loratools.dialects.peft.config import PeftConfig
from loratools.dialects.peft.fields import GROUPED
from loratools.dialects.peft.names import Groups
from loratools.dialects.peft.targets import EXPERTS
from loratools.storage.lazy import LazyTensor

Parts = dict[str, LazyTensor]

_NESTED = re.compile(r"(\.base_layer)+$")
_SWAPPED_BEFORE = (0, 19)  # PEFT's version that turned in and out of stacked parameters round


def outer(module: str) -> str:
    """Return a module's path without the `base_layer` that marks the inner one of several wrappers."""
    return _NESTED.sub("", module)


def layouts(groups: Groups, config: PeftConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return module -> layout of the stacks of experts in a file, and what is wrong with them.

    PEFT wraps a module once for each targeted parameter, the first innermost. Shapes tell the order: gate_up_proj
    (H → 2I) feeds down_proj (I → H). Where they leave both possible, it is the models' order, gate_up_proj innermost.
    """
    by_module: dict[str, dict[str, Any]] = {}
    faults = []
    # An old PEFT took every stack for (E, in, out); later, the base decides.
    transposed = True if config.version and config.version < _SWAPPED_BEFORE else None
    levels: dict[str, list[str]] = {}
    targeted: dict[str, set[str]] = {}
    for target in config.fields.get("target_parameters", ()):
        place, _, name = target.rpartition(".")
        targeted.setdefault(place or EXPERTS, set()).add(name)
    for module in groups.modules if targeted else ():
        if _parameters(outer(module), targeted):
            levels.setdefault(outer(module), []).append(module)
    for path, modules in levels.items():
        parameters = _parameters(path, targeted)
        modules.sort(key=len, reverse=True)  # innermost first
        if len(modules) != len(parameters):
            count = f"{len(modules)} wrapper(s) for {len(parameters)} parameters"
            faults.append(f"{path}: {count}, {', '.join(parameters)}")
            continue
        shapes = [_sides(groups.modules[module]) for module in modules]
        for module, parameter in zip(modules, _order(parameters, shapes), strict=True):
            rank = config.rank(f"{path}.{parameter}")
            rows = groups.modules[module][A].shape[0] if A in groups.modules[module] else 0
            if not rank or rows % rank:
                faults.append(f"{module}: A has {rows} rows, which is no multiple of the rank {rank} of {parameter}")
                continue
            by_module[module] = {"experts": rows // rank, "parameter": parameter, "transposed": transposed}
    return by_module, faults


def reordered(parts: Mapping[str, LazyTensor], layout: Mapping[str, Any], fields: Mapping[str, Any]) -> Parts:
    """Return a stack's factors with the columns of B as PEFT has them, the expert last: B (out, r·E).

    Unsloth's `lora_B_layout` marks a B (out, E·r) whose columns lie expert after expert.
    """
    fused = fields.get("unsloth_fused_expert_lora") or {}
    if GROUPED not in (fields.get("lora_B_layout"), fused.get("parameters") and GROUPED) or B not in parts:
        return dict(parts)
    (out, columns), experts = parts[B].shape, layout["experts"]
    if columns % experts:
        return dict(parts)  # which no stack can have
    turn = lambda tensor: tensor.reshape(out, experts, -1).transpose(1, 2).reshape(out, columns)  # noqa: E731
    return {**parts, B: parts[B].map(turn, parts[B].shape)}


def _parameters(path: str, targeted: Mapping[str, set[str]]) -> list[str]:
    """Return a module's targeted parameters as models register them: gate_up_proj first, others by name."""
    names = {name for suffix in suffixes(path) for name in targeted.get(suffix, ())}
    return sorted(names, key=lambda name: (name != "gate_up_proj", name))


def _order(parameters: Sequence[str], shapes: Sequence[tuple[int, int]]) -> Sequence[str]:
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return parameters
    fitting = [order for order in permutations(parameters) if _feeds(dict(zip(order, shapes, strict=True)))]
    return fitting[0] if len(fitting) == 1 else parameters


def _feeds(sides: Mapping[str, tuple[int, int]]) -> bool:
    """Tell whether (in, out) of the two parameters go together, as they are or turned round."""
    (hidden, wide), (inner, back) = sides["gate_up_proj"], sides["down_proj"]
    return (wide == 2 * inner and back == hidden) or (hidden == 2 * back and inner == wide)


def _sides(parts: Mapping[str, Any]) -> tuple[int, int]:
    """Return (in, out) of a module's factors, (0, 0) if one is missing."""
    return (parts[A].shape[-1], parts[B].shape[0]) if {A, B} <= parts.keys() else (0, 0)
