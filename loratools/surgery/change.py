"""What an adapter changes, module by module, as the matrix that is measured: with a base W' − W, else s·ΔW alone.

A change that depends on the weight it finds (DoRA, (IA)³, OFT, GLoRA, tensors trained whole) is known with the base
alone. Without it DoRA's is measured without the magnitude, others are left out, and both are said. A difference of a
bias is a change of its own, `module.bias`. Every change is measured by itself, at weight 1, in float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter import low_rank
from loratools.adapter.gathered import gathered, under_one_naming
from loratools.adapter.kinds import Update
from loratools.adapter.kinds._bias import BiasUpdate
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names, normalized
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.settle import settle
from loratools.adapter.placement.stacks import settled
from loratools.adapter.placement.tied import with_heads
from loratools.adapter.placement.weight import over_weights
from loratools.adapter.placement.whole import resolve_replacements
from loratools.decisions import warned
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.base import differences
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Patterns,
    names_of,
    open_adapters,
    open_asked,
    under_names_of,
)
from loratools.surgery.inputs.told import finite, tell

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.delta import Delta

ON_BASE = "its change depends on the base model (--base)"
_MAGNITUDE = "without its magnitude, whose effect depends on the base model (--base)"


@dataclass(frozen=True, slots=True, eq=False)
class ModuleChange:
    """One change, loaded when it is asked for; `shape` is that of the matrix, `rank` that of its update, 0 for none.

    `parameters` counts the numbers that say it. `base` loads the weight under it, laid out alike, None without a base.
    `factor` loads A (r, columns) alone, None where there is none. `product` is the update that is a product of two
    factors, None for another: many of one shape are worked on together.
    """

    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    load: Callable[[], Delta]
    base: Callable[[], Tensor] | None = None
    factor: Callable[[], Tensor] | None = None
    product: Update | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The changes of one adapter by module; `in_part` and `left_out` say why some are not measured as they act."""

    modules: Mapping[str, ModuleChange]
    in_part: Mapping[str, str]
    left_out: Mapping[str, str]


def measurable(
    adapters: Sequence[AdapterSource], base: ModelSource | None = None, dialect: str | None = None, *,
    alpha: float | None = None, include: Patterns = None, exclude: Patterns = None, model_type: str | None = None,
) -> tuple[Changes, ...]:  # fmt: skip
    """Return what each adapter changes, and warn of what is not measured as it acts.

    Raises what opening the adapters and the base raises, and `IncompatibleAdapter` where they do not fit together.
    """
    names = names_of(adapters)
    model, opened = open_asked(adapters, base, dialect, alpha, include, exclude, model_type)
    try:
        opened = gathered(under_one_naming(opened))
    except ValueError as error:
        raise IncompatibleAdapter("the adapters have the same experts in two ways", [str(error)]) from None
    if model is None:
        found = [alone(adapter) for adapter in _alike(opened, names)]
    else:
        on, fitted = _fitted(model, opened, names)
        alike = _alike(
            [settled(adapter, Names(on.specs, on.config), on.shapes, on.config)[0] for adapter in fitted], names
        )
        found = [_on(on, adapter) for adapter in alike]
    for name, changes in zip(names, found, strict=True):
        tell(name, changes.in_part, changes.left_out)
    return tuple(
        replace(each, modules={m: replace(change, load=finite(f"{name}: {m}", change.load))
                               for m, change in each.modules.items()})
        for name, each in zip(names, found, strict=True)
    )  # fmt: skip


def alone(adapter: Adapter) -> Changes:
    """Return what an adapter changes whatever the base is; the modules of which only the base tells are left out."""
    modules: dict[str, ModuleChange] = {}
    in_part: dict[str, str] = {}
    left_out = dict.fromkeys(adapter.replacements, f"as a tensor trained whole: {ON_BASE}")
    for module, update in adapter.updates.items():
        parts = {expert.path(module): expert for expert in update.members} or {module: update.direction}
        if not update.additive and not update.direction.additive:
            left_out[module] = f"as kind {update.kind}: {ON_BASE}"
            continue
        if update.unsettled and not update.members:
            left_out[module] = f"as kind {update.kind}, for only the base tells {update.unsettled} (--base)"
            continue
        modules |= {name: _additive(part, update.kind) for name, part in parts.items()}
        if not update.additive:
            in_part[module] = _MAGNITUDE
        if update.bias is not None:
            bias = BiasUpdate(update.bias, update.scaling, update.alpha)
            modules[f"{module}.bias"] = _additive(bias, bias.kind)
    return Changes(modules, in_part, left_out)


def _additive(update: Update, kind: str, base: Callable[[], Tensor] | None = None) -> ModuleChange:
    """Return the change of an update that adds the same ΔW to any weight."""
    factors, by_rows, (rows, *sides) = update.factored(), update.by_rows, update.shape
    shape = rows, prod(sides)

    if factors is not None:
        parameters, load = update.rank * sum(shape), partial(_product, update)
        return ModuleChange(kind, shape, update.rank, parameters, load, base, _factor(update), update)
    if by_rows is None:
        raise ValueError(f"kind {update.kind}: it adds a ΔW that is neither a product nor made by rows")
    parameters = sum(lazy.parameters for lazy in update.parts.values())
    return ModuleChange(
        kind, shape, update.rank, parameters, lambda: _dense(by_rows.dense().reshape(shape) * update.scaling), base
    )


def _product(update: Update) -> Delta:
    from loratools.linalg.delta import Product  # with torch, which products that are worked on together do not need

    return Product(*low_rank.load(update))


def _dense(D: Tensor) -> Delta:
    from loratools.linalg.delta import Dense

    return Dense(D)


def _alike(adapters: Sequence[Adapter], names: Sequence[str]) -> list[Adapter]:
    """Return adapters whose stacks of experts lie as those of the first one that has them.

    Raises `IncompatibleAdapter` with every stack that may lie in two ways.
    """
    stacks: dict[str, Update] = {}
    changed, problems = [], []
    for name, adapter in zip(names, adapters, strict=True):
        turned = {}
        for module, update in adapter.updates.items():
            if update.members:
                path = update.path(module)
                try:
                    turned[module] = low_rank.alike(stacks.setdefault(normalized(path), update), update)
                except ValueError as error:
                    problems.append(f"{name}: {path}: {error}")
        changed.append(replace(adapter, updates={**adapter.updates, **turned}) if turned else adapter)
    if problems:
        stacks_of = counted(len(problems), "stack of experts", "stacks of experts")
        raise IncompatibleAdapter(f"{stacks_of} may lie in two ways", problems, hint="Their base model tells (--base).")
    return changed


def _fitted(model: Checkpoint, opened: Sequence[Adapter], names: Sequence[str]) -> tuple[Checkpoint, list[Adapter]]:
    """Return the base, and each adapter under its names; warn where one was sealed with another base."""
    model = replicated(model, opened)
    inputs, notes = settle(
        model, under_names_of(model, open_adapters(list(opened), model, together=False)), strict=False
    )
    for note in notes:
        warned(note)
    for name, adapter in zip(names, opened, strict=True):
        if (identity := adapter.base) is not None and identity.sealed:
            # The tensors that it changes are enough: to read all of a model for its root takes long.
            needed = replace(identity, root=None) if identity.tensors else identity
            for sentence in differences(needed, model.stored or model)[:1]:
                warned("%s: measured on another base than the one it was sealed with: %s", name, sentence)
    return model, [each.adapter for each in inputs]


def _on(model: Checkpoint, adapter: Adapter) -> Changes:
    """Return the changes W' − W of an adapter that has a base's names."""
    adapter, heads = with_heads(adapter, model)
    shapes = {name: spec.shape for name, spec in model.specs.items()}
    shapes |= {head: shapes[embedding] for head, embedding in heads.items()}
    whole = resolve_replacements(adapter, shapes, model.config)

    def weight(name: str) -> Tensor:
        return whole[name].load() if name in whole else model.read(heads.get(name, name))

    modules: dict[str, ModuleChange] = {}
    left_out: dict[str, str] = {}
    for name, lazy in whole.items():
        if shapes.get(name) != lazy.shape:
            why = f"the base has it with shape {list(shapes[name])}" if name in shapes else "the base has none"
            left_out[name] = f"as a tensor of shape {list(lazy.shape)}: {why}"
        else:
            modules[name] = _replaced(lazy, partial(model.read, heads.get(name, name)))
    after = shapes | {name: tensor.shape for name, tensor in whole.items()}
    grouped: dict[str, list[Placement]] = defaultdict(list)
    for placement in over_weights(model, resolve(adapter, after, model.config)):
        name = placement.update.path(placement.module) + (".bias" if placement.bias else "")
        grouped[name].append(placement)
    for module, sites in grouped.items():
        modules[module] = _placed(sites, weight)
    return Changes(modules, {}, left_out)


def _replaced(lazy: LazyTensor, base: Callable[[], Tensor]) -> ModuleChange:
    """Return the change of a tensor trained whole, of the base's shape."""
    shape = lazy.shape[0] if lazy.shape else 1, prod(lazy.shape[1:])

    def under() -> Tensor:
        return base().double().reshape(shape)

    return ModuleChange(
        "whole", shape, 0, lazy.parameters, lambda: _dense(lazy.load().double().reshape(shape) - under()), under
    )


def _placed(sites: Sequence[Placement], weight: Callable[[str], Tensor]) -> ModuleChange:
    """Return the change of one module where its weight lies in the base: whole, in a fused one, or in several."""
    update, first = sites[0].update, sites[0].site
    rows = max(placement.site.part_rows.stop for placement in sites)
    shape = rows, first.shape[0 if first.transposed else 1]

    def under() -> Tensor:
        return _assembled(sites, shape, lambda placement: _rectangle(placement, weight))

    def change() -> Delta:
        return _dense(_assembled(sites, shape, lambda placement: _difference(placement, weight)))

    if update.additive:
        return replace(_additive(update, update.kind), base=under)
    parameters = sum(lazy.parameters for lazy in update.parts.values())
    return ModuleChange(update.kind, shape, update.rank, parameters, change, under, _factor(update))


def _factor(update: Update) -> Callable[[], Tensor] | None:
    product = low_rank.low_rank(update)
    return None if product is None else lambda: low_rank.load(product)[1]


def _assembled(sites: Sequence[Placement], shape: tuple[int, int], rectangle: Callable[[Placement], Tensor]) -> Tensor:
    import torch

    whole = torch.zeros(shape, dtype=torch.float64)
    for placement in sites:
        block = rectangle(placement)
        whole[placement.site.part_rows] = block.T if placement.site.transposed else block
    return whole


def _rectangle(placement: Placement, weight: Callable[[str], Tensor]) -> Tensor:
    site = placement.site
    return weight(site.tensor).reshape(site.matrix)[slice(*site.rows), slice(*site.columns)].double()


def _difference(placement: Placement, weight: Callable[[str], Tensor]) -> Tensor:
    """Return W' − W of a site, as the base stores it."""
    import torch

    W = _rectangle(placement, weight)
    term = placement.update.term(placement.site, 1.0, torch.float64, torch.device("cpu"))
    every, changed = slice(0, len(W)), W.clone()
    if term.needs_pass:
        term.observe_rows(W, every)
    term.apply_rows(changed, every, None)
    return changed - W
