"""Experts of one adapter, each a module of its own, as the stacks that another adapter has of the same experts.

`….experts.7.gate_proj` and `up_proj` of every expert become `….experts.gate_up_proj`: the same change, whose factors
are those of a block diagonal, with zeros where an expert or a projection was not trained. So two adapters of one model
can be added up and compared, whichever way each was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.adapter import factors, kinds
from loratools.adapter.fusing import products
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.stacked import nested
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.parts import A, B
from loratools.adapter.placement.stacks import PARAMETERS, listed, spellings
from loratools.storage.lazy import LazyTensor

_LAYER = re.compile(r"(?:layers|h)\.\d+\.")
_EXPERT = re.compile(r".+\.experts\.(?:\d+\.\w+|\w+_projs\.\d+)")

_Modules = Mapping[str, str]
"""Normalized name of a module -> its name in the adapter."""


def under_one_naming(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return adapters, those of image models under diffusers' names where some have them and some the original's."""
    original = [any(module.startswith("diffusion_model.") for module in each.updates) for each in adapters]
    if all(original) or not any(original):
        return list(adapters)
    from loratools.adapter.naming.image import rename  # families take time to read

    return [rename.to_diffusers(rename.spelled_out(adapter)) for adapter in adapters]


def canonically_named(adapter: Adapter) -> Adapter:
    """Return an adapter whose names do not depend on who wrote it: an image model's, which have several, diffusers'.

    A language model's, with its layers right below, has one naming but for its wrappers (`normalized`).
    """
    if any(_LAYER.match(normalized(module)) for module in adapter.updates):
        return adapter
    from loratools.adapter.naming.image import rename  # families take time to read

    return rename.to_diffusers(rename.spelled_out(adapter))


def gathered(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return adapters in which experts are stacked where they are in another one; the same where that changes nothing.

    Raises `ValueError` for an expert whose update is no plain product, or does not fit the others.
    """
    stacks = [
        (normalized(path), path, update)
        for adapter in adapters
        for module, update in adapter.updates.items()
        if update.members and (path := update.path(module)).endswith(f".{update.layout['parameter']}")
    ]
    return [_stacked(adapter, stacks) for adapter in adapters] if stacks else list(adapters)


def _stacked(adapter: Adapter, stacks: Sequence[tuple[str, str, Update]]) -> Adapter:
    modules = {normalized(module): module for module in adapter.updates if _EXPERT.fullmatch(module)}
    made: dict[str, dict[str, Update]] = {}
    used: set[str] = set()
    for path, own, like in stacks if modules else ():
        parameter = like.layout["parameter"]
        stack = own.removesuffix(f".{parameter}")
        if parameter in made.get(stack, {}):
            continue
        each = [_expert(path.removesuffix(f".{parameter}"), parameter, e, modules) for e in range(like.shape[0])]
        if names := {name for expert in each for name in expert if name}:
            made.setdefault(stack, {})[parameter] = _stack(parameter, each, adapter.updates)
            used |= names
    if not used:
        return adapter
    updates = {module: update for module, update in adapter.updates.items() if module not in used}
    for stack, parameters in made.items():
        updates |= {module: parameters[parameter] for parameter, module in nested(stack, parameters).items()}
    settings = {name: value for name, value in adapter.settings.items() if name != "target_modules"}
    return replace(adapter, updates=updates, settings=settings)


def _expert(stack: str, parameter: str, number: int, modules: _Modules) -> list[str | None]:
    """Return the modules of one expert's projections in a parameter, None for one that the adapter has not."""
    for path in spellings(stack):
        if whole := modules.get(listed(path, parameter, number)):
            return [whole]
        names = [
            next((modules[name] for short in known if (name := f"{path}.{number}.{short}") in modules), None)
            for known in PARAMETERS.get(parameter, ())
        ]
        if any(names):
            return names
    return []


def _stack(parameter: str, each: Sequence[Sequence[str | None]], updates: Mapping[str, Update]) -> Update:
    """Return the stack of experts by the modules of each; of one that has none ΔW is zero."""
    blocks = [_block([updates[name] if name else None for name in names]) if any(names) else None for names in each]
    present = [block for block in blocks if block is not None]
    if len(shapes := {block.shape for block in present}) > 1:
        first = next(name for names in each for name in names if name)
        raise ValueError(f"{first}: experts of different shapes, {' and '.join(map(str, sorted(shapes)))}")
    (out, inner), r = present[0].shape, max(block.rank for block in present)
    scaling, dtype = present[0].scaling or 1.0, present[0].parts[A].dtype
    left, right = [], []
    for block in blocks:
        if block is None:
            left.append(factors.zeros((out, r), dtype))
            right.append(factors.zeros((r, inner), dtype))
        else:
            left.append(factors.padded(factors.scaled(block.parts[B], block.scaling / scaling), 1, r))
            right.append(factors.padded(block.parts[A], 0, r))
    count = len(blocks)
    parts: dict[str, LazyTensor] = {
        A: factors.joined(right),
        B: factors.joined(left).map(
            lambda B: B.reshape(count, out, r).permute(1, 2, 0).reshape(out, r * count), (out, r * count)
        ),
    }
    # A linear layer's factors, as PEFT since 0.19.1 has them where a class says that it stores the transpose.
    layout = {"experts": count, "parameter": parameter, "transposed": None, "rule": "model"}
    stack: Update = kinds.get("experts").build(parts, scaling, scaling * r, layout)
    return stack


def _block(projections: Sequence[Update | None]) -> Update:
    """Return the update of one expert's projections, below each other."""
    rows = next(update.shape[0] for update in projections if update is not None)
    if any(
        update is not None and (not products.divisible(update) or update.parts.keys() - {A, B})
        for update in projections
    ):
        raise ValueError("experts one by one beside a stack of them: only plain products can be put together")
    return products.together(projections, [rows] * len(projections))
