"""What consumers of PEFT adapters ask beyond PEFT: an adapter is changed so that they apply the same ΔW, or refused.

serving   what all of them read: one rank, one scaling, no patterns, no rsLoRA, every layer of every target type
vllm      vLLM 0.33: patterns and rsLoRA are read; ranks up to 512; score and classifier may be trained whole
sglang    SGLang 0.5.23: scaling is lora_alpha/r for all, patterns are ignored without a word; q_proj needs v_proj
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from loratools.adapter import factors, kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, A, B
from loratools.dialects._frame.numbers import most_common
from loratools.errors import LossyConversion, UnknownName, counted
from loratools.options import near

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Profile:
    """What one consumer reads.

    `kinds`        kinds of update
    `whole`        last segments of the modules whose tensors may be trained whole
    `uniform`      whether all updates must have one rank and one scaling
    `every_layer`  whether a target needs an update in every layer
    `needs`        a target, and the one that it needs beside it
    `max_rank`     the largest rank, or None for any
    """

    name: str
    kinds: frozenset[str]
    whole: frozenset[str] = frozenset()
    uniform: bool = True
    every_layer: bool = False
    needs: tuple[str, str] | None = None
    max_rank: int | None = None


Name = Literal["serving", "vllm", "sglang"]

PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("serving", frozenset({"lora"}), every_layer=True),
        Profile("vllm", frozenset({"lora", "embedding"}), frozenset({"score", "classifier"}), False, max_rank=512),
        Profile("sglang", frozenset({"lora"}), needs=("q_proj", "v_proj")),
    )
}


def apply(adapter: Adapter, name: str, base: Shapes | None = None) -> Adapter:
    """Return the adapter as a consumer reads it, with every ΔW the same.

    `name` is one of `PROFILES`. `base` holds the shapes of the base's tensors: absent layers get zero factors by them,
    and without it they are refused. Raises `LossyConversion` with all that the consumer refuses or would drop,
    `UnknownName` for another name.
    """
    if name not in PROFILES:
        raise UnknownName(f"no profile {name!r}; there are {', '.join(PROFILES)}{near(name, PROFILES)}")
    profile = PROFILES[name]
    problems = list(_refused(adapter, profile))
    if profile.every_layer and not problems:
        adapter, missing = _every_layer(adapter, base)
        problems += missing
    if problems:
        raise LossyConversion(
            f"the consumer {profile.name} would refuse or change this adapter: {counted(len(problems), 'reason')}",
            problems,
            hint="Merge it into the base model instead, or give the base model with --base where layers are missing.",
        )
    if profile.uniform:
        adapter = uniform(adapter)
    return _short_targets(adapter, base)


def _refused(adapter: Adapter, profile: Profile) -> Iterable[str]:
    for module, update in adapter.updates.items():
        extra = sorted(update.parts.keys() - {A, B, A_EMBEDDING, B_EMBEDDING})
        if update.kind not in profile.kinds:
            yield f"{module}: updates of kind {update.kind} are not applied"
        elif extra:
            yield f"{module}: {', '.join(extra)} is not applied"
        elif profile.max_rank and update.rank > profile.max_rank:
            yield f"{module}: rank {update.rank}, at most {profile.max_rank} is loaded"
    for path in adapter.replacements:
        if not set(path.split(".")[-2:-1]) & profile.whole:
            yield f"{path}: a tensor trained whole is not loaded"
    if profile.needs:
        target, needed = profile.needs
        for module in adapter.updates:
            partner = f"{module.removesuffix(target)}{needed}"
            if module.endswith(f".{target}") and partner not in adapter.updates:
                yield f"{module}: it is loaded only together with {partner}, which has no update"


def uniform(adapter: Adapter) -> Adapter:
    """Return all updates with the largest rank, filled up by zeros, and the most common scaling; B takes the ratio."""
    rank = max(update.rank for update in adapter.updates.values())
    scaling = most_common(update.scaling for update in adapter.updates.values())
    build, updates = kinds.get("lora").build, {}
    for module, update in adapter.updates.items():
        b = factors.scaled(update.parts[B], update.scaling / scaling)
        parts = {A: factors.padded(update.parts[A], 0, rank), B: factors.padded(b, 1, rank)}
        updates[module] = build(parts, scaling, scaling * rank)
    return replace(adapter, updates=updates)


def _every_layer(adapter: Adapter, base: Shapes | None) -> tuple[Adapter, list[str]]:
    """Return the adapter with zero factors in the layers that it does not touch, and what cannot be known."""
    kinds_of: dict[tuple[str, str], dict[int, Update]] = defaultdict(dict)
    for module, update in adapter.updates.items():
        if match := _LAYER.fullmatch(module):
            kinds_of[match[1], match[3]][int(match[2])] = update
    wanted = _layers(base) if base is not None else None
    last = max((max(updates) for updates in kinds_of.values()), default=0)
    added: dict[str, Update] = {}
    problems = []
    for (front, target), updates in kinds_of.items():
        layers = set(range(last + 1)) if wanted is None else wanted.get((normalized(f"{front}.0"), target), {}).keys()
        missing = sorted(layers - updates.keys())
        if missing and wanted is None:
            shown = ", ".join(map(str, missing[:12]))
            problems.append(f"{front}.*.{target}: no update in layers {shown} of {last + 1}")
            continue
        like = next(iter(updates.values()))
        for layer in missing:
            shape = (wanted or {})[normalized(f"{front}.0"), target][layer]
            shape = like.shape if shape[::-1] == like.shape else shape  # a Conv1D is stored [in, out]
            added[f"{front}.{layer}.{target}"] = _zero_update(shape, like.parts[A].dtype)
    return replace(adapter, updates={**adapter.updates, **added}), problems


def _layers(base: Shapes) -> dict[tuple[str, str], dict[int, tuple[int, ...]]]:
    """Return (where the layers are, target) -> layer -> shape, for all matrices of the base."""
    shapes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for tensor, shape in base.items():
        match = _LAYER.fullmatch(tensor.removesuffix(".weight"))
        if match and len(shape) == 2 and tensor.endswith(".weight"):
            shapes[normalized(f"{match[1]}.0"), match[3]][int(match[2])] = shape
    return shapes


def _zero_update(shape: tuple[int, ...], dtype: str) -> Update:
    parts = {A: factors.zeros((1, shape[1]), dtype), B: factors.zeros((shape[0], 1), dtype)}
    update: Update = kinds.get("lora").build(parts, 1.0, 1.0)
    return update


def _short_targets(adapter: Adapter, base: Shapes | None) -> Adapter:
    """Return the adapter with last names as targets, unless one of them would also match what it does not touch."""
    short = sorted({module.rpartition(".")[2] for module in adapter.updates})
    ours = {normalized(module) for module in adapter.updates}
    modules = (tensor.removesuffix(".weight") for tensor in base or () if tensor.endswith(".weight"))
    others = any(module.rpartition(".")[2] in short and normalized(module) not in ours for module in modules)
    dropped = ("exclude_modules", "layers_to_transform", "target_modules")
    settings = {key: value for key, value in adapter.settings.items() if key not in dropped}
    return replace(adapter, settings=settings if others else {**settings, "target_modules": short})
