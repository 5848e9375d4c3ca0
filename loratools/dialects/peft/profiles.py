"""What consumers of PEFT adapters ask beyond PEFT: an adapter is made so that they apply the same ΔW, or is refused.

serving   what all of them read: one rank, one scaling, no patterns, no rsLoRA, every layer of every target type
vllm      vLLM 0.33: patterns and rsLoRA are read; ranks up to 512; score and classifier may be trained whole
sglang    SGLang 0.5.23: scaling is lora_alpha/r for all, patterns are ignored without a word; q_proj needs v_proj
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loratools.adapter import factors, kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.parts import A, B
from loratools.errors import LossyConversion, UnknownKind
from loratools.storage.lazy import LazyTensor

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Profile:
    """What one consumer reads. `kinds` of update, tensors trained `whole` (last module's name), whether all must be of
    one rank and scaling (`uniform`), in `every_layer`, and pairs of targets (one, the other that it `needs`)."""

    name: str
    kinds: frozenset[str]
    whole: frozenset[str] = frozenset()
    uniform: bool = True
    every_layer: bool = False
    needs: tuple[str, str] | None = None
    max_rank: int | None = None


PROFILES: Mapping[str, Profile] = {
    one.name: one
    for one in (
        Profile("serving", frozenset({"lora"}), every_layer=True),
        Profile("vllm", frozenset({"lora", "embedding"}), frozenset({"score", "classifier"}), False, max_rank=512),
        Profile("sglang", frozenset({"lora"}), needs=("q_proj", "v_proj")),
    )
}


def apply(adapter: Adapter, name: str, base: Shapes | None = None) -> Adapter:
    """Return the adapter as a consumer reads it, with every ΔW the same.

    `base` are the shapes of the base's tensors, from which absent layers get zero factors. Raises `LossyConversion`
    with all that the consumer refuses or would drop, `UnknownKind` for a profile of another name.
    """
    if name not in PROFILES:
        raise UnknownKind(f"no profile {name!r}; there are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    problems = list(_refused(adapter, profile))
    if profile.every_layer and not problems:
        adapter, missing = _every_layer(adapter, base)
        problems += missing
    if problems:
        raise LossyConversion(
            f"the consumer {profile.name} would refuse or change this adapter: {len(problems)} reason(s)",
            problems,
            hint="Merge it into the base model instead, or give the base model with --base where layers are missing.",
        )
    if profile.uniform:
        adapter = uniform(adapter)
    return _short_targets(adapter, base)


def _refused(adapter: Adapter, profile: Profile) -> Iterable[str]:
    for module, update in adapter.updates.items():
        extra = sorted(update.parts.keys() - {A, B, "lora_embedding_A", "lora_embedding_B"})
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
    """Return all updates with the largest rank, by zeros, and the most common scaling, the rest of it in B."""
    rank = max(update.rank for update in adapter.updates.values())
    counts = Counter(update.scaling for update in adapter.updates.values() if update.scaling)
    scaling = max(counts, key=lambda value: (counts[value], value), default=1.0)
    updates: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        parts = {
            A: factors.padded(update.parts[A], 0, rank),
            B: factors.padded(factors.scaled(update.parts[B], update.scaling / scaling), 1, rank),
        }
        updates[module] = kinds.get("lora").build(parts, scaling, scaling * rank)
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
            problems.append(
                f"{front}.*.{target}: no update in layer(s) {', '.join(map(str, missing[:12]))} of {last + 1}"
            )
            continue
        like = next(iter(updates.values()))
        for layer in missing:
            shape = (wanted or {})[normalized(f"{front}.0"), target][layer]
            shape = like.shape if shape[::-1] == like.shape else shape  # a Conv1D is stored [in, out]
            added[f"{front}.{layer}.{target}"] = _nothing(shape, like.parts[A].dtype)
    return replace(adapter, updates={**adapter.updates, **added}), problems


def _layers(base: Shapes) -> dict[tuple[str, str], dict[int, tuple[int, ...]]]:
    """Return (where the layers are, target) -> layer -> shape, for all matrices of the base."""
    shapes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for tensor, shape in base.items():
        match = _LAYER.fullmatch(tensor.removesuffix(".weight"))
        if match and len(shape) == 2 and tensor.endswith(".weight"):
            shapes[normalized(f"{match[1]}.0"), match[3]][int(match[2])] = shape
    return shapes


def _nothing(shape: tuple[int, ...], dtype: str) -> Update:
    def zeros(*sides: int) -> LazyTensor:
        def load() -> object:
            import torch

            from loratools.storage.dtypes import to_torch

            return torch.zeros(sides, dtype=to_torch(dtype))

        return LazyTensor(dtype, sides, load)  # type: ignore[arg-type]

    update: Update = kinds.get("lora").build({A: zeros(1, shape[1]), B: zeros(shape[0], 1)}, 1.0, 1.0)
    return update


def _short_targets(adapter: Adapter, base: Shapes | None) -> Adapter:
    """Return the adapter with last names as targets, unless one of them would also match what it does not touch."""
    short = sorted({module.rpartition(".")[2] for module in adapter.updates})
    ours = {normalized(module) for module in adapter.updates}
    others = [
        tensor
        for tensor in base or ()
        if tensor.endswith(".weight")
        and tensor.removesuffix(".weight").rpartition(".")[2] in short
        and normalized(tensor.removesuffix(".weight")) not in ours
    ]
    settings = {k: v for k, v in adapter.settings.items() if k not in ("exclude_modules", "layers_to_transform")}
    settings.pop("target_modules", None)
    return replace(adapter, settings=settings if others else {**settings, "target_modules": short})
