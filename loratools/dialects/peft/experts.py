"""Which parameter each of PEFT's wrappers around a stack of experts is for; the names in a file do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.naming.compact import suffixes
from loratools.adapter.parts import A, B
from loratools.dialects.peft.config import PeftConfig
from loratools.dialects.peft.fields import GROUPED
from loratools.dialects.peft.names import Groups
from loratools.errors import counted
from loratools.storage.lazy import LazyTensor

Parts = dict[str, LazyTensor]

_NESTED = r"(\.base_layer)+$"
_EXPERTS = "experts"  # what classes call a module of stacked experts
_MANY = 6  # parameters of one module; classes have four at most

# Whether a stack lies (in, out) where its class says is_transposed, and where it does not -> version
_VERSIONS: Mapping[tuple[bool | None, ...], str] = {
    (True, True): "0.18.1",
    (False, True): "0.19.0",
    (True, False): "0.19.1",
    (False, False): "0.19.1",  # of classes that do not say it
}


def outer(module: str) -> str:
    """Return a module's path without the `base_layer` that marks the inner one of several wrappers."""
    return re.sub(_NESTED, "", module)


def holders(groups: Groups, config: PeftConfig) -> dict[str, set[str]]:
    """Return module -> the names of its own parameters that the config targets; of those without a path, any may be.

    PEFT takes a name without a path in every module that has such a parameter, which the file does not say. A module
    has one where it is wrapped more than once, its factors are several of the rank, or it is called `experts`, unless
    it is a target itself.
    """
    targeted: dict[str, set[str]] = {}
    for target in config.fields.get("target_parameters", ()):
        place, _, name = target.rpartition(".")
        if place:
            targeted.setdefault(place, set()).add(name)
    if not targeted and not config.targets.pathless:
        return {}
    held: dict[str, set[str]] = {}
    for module, parts in groups.modules.items():
        path = outer(module)
        names = {name for suffix in suffixes(path) for name in targeted.get(suffix, ())}
        if config.targets.pathless and (path in held or _is_stack(module, parts, config)):
            names |= config.targets.pathless
        if names:
            held[path] = held.get(path, set()) | names
    return held


def _is_stack(module: str, parts: Mapping[str, LazyTensor], config: PeftConfig) -> bool:
    path = outer(module)
    if path != module or path.rpartition(".")[2] == _EXPERTS:
        return True
    if A not in parts or config.targets.select(path):
        return False
    ranks = {config.rank(f"{path}.{name}") for name in config.targets.pathless}
    return any(rank and parts[A].shape[0] > rank and parts[A].shape[0] % rank == 0 for rank in ranks)


def layouts(
    groups: Groups, config: PeftConfig, held: Mapping[str, set[str]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return module -> layout of the stack of experts there, and what is wrong with them; `held` is of `holders`.

    PEFT wraps a module once for each targeted parameter, in the order in which its class registers them, the first
    innermost; the order in `target_parameters` means nothing. A layout follows the order of the classes of
    transformers; its `others` are for a base whose shapes or class tell otherwise, each with scaling and alpha.
    """
    by_module: dict[str, dict[str, Any]] = {}
    faults = []
    levels: dict[str, list[str]] = {}
    for module in groups.modules if held else ():
        if outer(module) in held:
            levels.setdefault(outer(module), []).append(module)
    for path, modules in levels.items():
        parameters = held[path]
        modules.sort(key=len, reverse=True)  # innermost first
        least = len(parameters - config.targets.pathless)
        if not max(least, 1) <= len(modules) <= min(len(parameters), _MANY) or len(parameters) > _MANY:
            wrappers = f"{counted(len(modules), 'wrapper')} for {len(parameters)} parameters"
            faults.append(f"{path}: {wrappers}, {', '.join(sorted(parameters)[:_MANY])}")
            continue
        rows = [groups.modules[module][A].shape[0] if A in groups.modules[module] else 0 for module in modules]
        ranks = {parameter: config.rank(f"{path}.{parameter}") for parameter in parameters}
        must = parameters - config.targets.pathless
        possible = [order for order in permutations(sorted(parameters), len(modules)) if must <= set(order)]
        orders = [order for order in possible if _divides(rows, [ranks[name] for name in order])]
        from loratools.adapter.naming.stacked import in_order

        known = [order for order in possible if in_order(order) == list(order)]
        likely = next((order for order in (*known, *orders) if len(orders) != 1 or order in orders), possible[0])
        for module, count, parameter in zip(modules, rows, likely, strict=True):
            if likely not in orders:
                rank = ranks[parameter]
                if not rank or count % rank:
                    why = f"A has {count} rows, which is no multiple of the rank {rank} of {parameter}"
                    faults.append(f"{module}: {why}")
                continue
            place = modules.index(module)
            names = dict.fromkeys((parameter, *(order[place] for order in orders)))
            first, *others = (_layout(name, count // (ranks[name] or 1), config) for name in names)
            first["ordered"] = len(known) == 1 or not others
            first["others"] = [
                {**other, "scaling": config.scaling(target, ranks[name] or 1), "alpha": config.alpha(target)}
                for other in others
                for name in [other["parameter"]]
                for target in [f"{path}.{name}"]
            ]
            by_module[module] = first
    return by_module, faults


def _divides(rows: Sequence[int], ranks: Sequence[int | None]) -> bool:
    """Tell whether factors with so many rows can be for parameters of these ranks, in this order."""
    return all(rank and count and count % rank == 0 for count, rank in zip(rows, ranks, strict=True))


def _layout(parameter: str, experts: int, config: PeftConfig) -> dict[str, Any]:
    # Of one expert PEFT adds B·A as it is, whatever its class.
    rule = config.stack_rule if experts > 1 else "out_in"
    stated = True if rule == "in_out" and config.version else None
    return {"experts": experts, "parameter": parameter, "transposed": stated, "rule": rule}


def version_for(updates: Mapping[str, Update]) -> str | None:
    """Return the first PEFT that takes the stacks of an adapter as they are, for its config; None without stacks.

    A word that is no version stands for stacks of which it is not known.
    """
    each = {
        tuple(update.stored_in_out(is_transposed) for is_transposed in (True, False))
        for update in updates.values()
        if update.readings and update.shape[0] > 1
    }
    return _VERSIONS.get(each.pop(), "unknown") if len(each) == 1 else "0.19.1" if each else None


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
