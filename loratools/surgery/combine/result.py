"""The adapter that several become: its settings, the base tensors it names, its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.placement.stacks import path_of
from loratools.adapter.weights import Weight
from loratools.decisions import warned
from loratools.engine.device import described
from loratools.errors import UnsupportedAdapter
from loratools.format import manifest
from loratools.format.canonical import said
from loratools.format.record import DEVICE, TOOL
from loratools.storage.dtypes import FloatName
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import methods
from loratools.surgery.combine.entries import joined
from loratools.surgery.combine.inputs import Aligned, Input
from loratools.surgery.combine.options import CombineOptions

# Settings that the result keeps where no adapter says otherwise; the rest describes factors that are gone.
_SHARED = ("task_type", "auto_mapping", "fan_in_fan_out", "ensure_weight_tying", "layer_replication", "lora_dropout",
           "reshape_weight")  # fmt: skip
_ENTRY = ("tensor", "layout")
_OF_DIALECTS = ("gguf", "base_config")
_KEPT: tuple[FloatName, ...] = ("BF16", "F16")


def step_of(operation: str, inputs: Sequence[Input], options: CombineOptions, initial: bool, error: float) -> Step:
    """Return what the provenance says of an operation on these inputs, whose result has this relative error."""
    recorded: dict[str, Any] = {"method": options.method, "dtype": options.stored, "error": float(f"{error:.6g}")}
    stated = {"density": options.density, "gamma": options.gamma, "epsilon": options.epsilon, "like": options.like}
    stated |= {"normalize": options.normalize, "rescale": options.rescale}
    recorded |= {name: value for name, value in stated.items() if value is not None}
    if options.rule is not None:
        recorded["ranks"] = options.rule.to_json()
    if initial:
        recorded["initial"] = True
    numbers = [_number(each.weight) for each in inputs]
    if None in numbers:
        recorded["weights"] = [each.weight.to_json() for each in inputs]
    sources = tuple(
        {"digest": each.digest} | ({} if number is None else {"weight": number})
        for each, number in zip(inputs, numbers, strict=True)
    )
    if on := described(options.computes_on):
        recorded[DEVICE] = on
    return Step(operation, TOOL, recorded, sources, methods.seed_of(options.method, options))


def _number(weight: Weight) -> float | None:
    """Return the one number that a weight is, None where it is several, or one that a manifest has no number for."""
    return weight.default if weight.plain and said(weight.default) == weight.default else None


def assemble(
    adapters: Sequence[Adapter], aligned: Aligned, updates: Mapping[str, Update],
    replacements: Mapping[str, LazyTensor], base: BaseIdentity | None, done: Step, weights: Sequence[Any],
) -> Adapter:  # fmt: skip
    """Return the adapter of new updates and replacements, with what its inputs agree on, and their provenance.

    `weights` are those of the inputs as JSON has them.

    Raises `UnsupportedAdapter` where adapters bring different copies of a tensor of the base.
    """
    stated = {key: [adapter.settings[key] for adapter in adapters if key in adapter.settings] for key in _SHARED}
    settings = {key: each[0] for key, each in stated.items() if each and each.count(each[0]) == len(each)}
    saved = {name for adapter in adapters for name in adapter.settings.get("modules_to_save") or ()}
    if saved and replacements:
        settings["modules_to_save"] = sorted(saved)
    biases = [adapter.settings.get("bias") for adapter in adapters]
    if replacements and (bias := next((wide for wide in ("all", "lora_only") if wide in biases), None)):
        settings["bias"] = bias
    if len(updates) == len(aligned.modules) and (targets := _targets(adapters)):
        settings["target_modules"] = targets
    if parameters := {
        f"{path_of(module)}.{reading.layout['parameter']}"
        for module, update in updates.items()
        for reading in update.readings
    }:
        settings["target_parameters"] = sorted(parameters)
    settings |= joined(adapters, weights, updates, done)
    settings[manifest.ORIGIN] = _origin(adapters, aligned, updates, replacements)
    history = {_key(entry): entry for adapter in adapters for entry in adapter.provenance}
    copies = _copies(adapters, aligned, replacements)
    return Adapter(updates, replacements, base, (*history.values(), done), "loratools", settings, copies)


def plain(adapter: Adapter, settings: Mapping[str, Any] | None = None) -> Adapter:
    """Return an adapter without what no foreign dialect has a place for: provenance, and the hash of its base.

    `settings` are those of an input: what its dialect needs to write it (GGUF's architecture) comes from there.
    """
    base = adapter.base and BaseIdentity(adapter.base.id, adapter.base.revision)
    needed = {name: value for name, value in (settings or {}).items() if name in _OF_DIALECTS}
    return replace(adapter, provenance=(), base=base, settings={**needed, **adapter.settings})


def dialect_of(adapters: Sequence[Adapter], result: Adapter) -> tuple[str, Adapter]:
    """Return the dialect that the result of adapters is written in, and the result as that one takes it.

    It is that of the first; ours for PEFT's, for one that is only read, and, which is said, where it cannot say all.
    """
    dialect = adapters[0].dialect
    if dialect in ("peft", "loratools") or dialect not in dialects.names():
        return "loratools", result
    foreign = plain(result, adapters[0].settings)
    if lost := dialects.get(dialect).losses(foreign):
        warned("the result is in the loratools format; %s cannot say: %s", dialect, lost[0])
        return "loratools", result
    return dialect, foreign


def dtype_of(adapters: Sequence[Adapter]) -> FloatName:
    """Return the dtype of the factors of adapters, float32 where they have several, or a shorter one."""
    each = (update for adapter in adapters for update in adapter.updates.values())
    stored = {lazy.dtype for update in each for lazy in update.parts.values()}
    return next((name for name in _KEPT if stored == {name}), "F32")


def _targets(adapters: Sequence[Adapter]) -> list[str]:
    """Return the union of the target lists, where it names what they name; full names serve where it might not."""
    lists = [adapter.settings.get("target_modules") for adapter in adapters]
    narrowing = ("exclude_modules", "layers_to_transform")
    narrowed = any(adapter.settings.get(key) for adapter in adapters for key in narrowing)
    if narrowed or not all(isinstance(names, list | tuple | set | frozenset) for names in lists):
        return []
    return sorted({str(name) for names in lists if names for name in names})


def _origin(
    adapters: Sequence[Adapter], aligned: Aligned, updates: Mapping[str, Update], replacements: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """Return the base tensor, and a layout, of each module and replaced parameter, as far as an input says it."""
    origin: dict[str, dict[str, Any]] = {"modules": {}, "replacements": {}}
    for number, adapter in enumerate(adapters):
        old = adapter.settings.get(manifest.ORIGIN, {})
        for group, kept in (("modules", updates), ("replacements", replacements)):
            for own, entry in old.get(group, {}).items():
                path = aligned.renamed[number].get(own) or aligned.path(number, own)
                if path in kept and (stated := {key: entry[key] for key in _ENTRY if key in entry}):
                    origin[group].setdefault(path, stated)
    return {group: entries for group, entries in origin.items() if entries}


def _copies(
    adapters: Sequence[Adapter], aligned: Aligned, replacements: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    copies: dict[str, LazyTensor] = {}
    problems = []
    for number, adapter in enumerate(adapters):
        for own, lazy in adapter.copies.items():
            path = aligned.path(number, own)
            if path in replacements:
                continue
            if path in copies and not _equal(copies[path], lazy):
                problems.append(f"{path}: copies that differ came along with the adapters")
            copies.setdefault(path, lazy)
    if problems:
        raise UnsupportedAdapter("adapters of different bases, or of different vocabularies", problems)
    return copies


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    import torch

    return torch.equal(one.load(), other.load())


def _key(entry: Step) -> str:
    inputs = [dict(source) for source in entry.inputs]
    return manifest.canonical([entry.operation, entry.tool, said(entry.parameters), inputs, entry.seed])
