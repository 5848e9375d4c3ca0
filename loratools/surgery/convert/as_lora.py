"""A LoRA of an adapter of any kind: the nearest change of a rank to that of each module (Eckart-Young)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.adapter import kinds
from loratools.adapter import parts as part_names
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.dialects._frame.build import is_embedding
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter, counted
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

    from loratools.linalg.delta import Delta
    from loratools.surgery.change import ModuleChange

_DROPPED = (
    "peft_type", "peft_fields", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "rank_pattern", "alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """The LoRA of one module: the kind that it was, its rank, and its error ‖ΔW − B·A‖/‖ΔW‖, 0 where ΔW is zero."""

    module: str
    kind: str
    rank: int
    relative_error: float


@dataclass(frozen=True, slots=True)
class LoraError:
    """How near a LoRA is to the adapter that it was made of: √Σ‖ΔW − B·A‖²/√Σ‖ΔW‖², and each module's."""

    rank: int
    relative_error: float
    modules: tuple[ModuleLora, ...]


def as_lora(adapter: Adapter, rank: int, base: Checkpoint | None = None) -> tuple[Adapter, LoraError]:
    """Return a LoRA of at most a rank that does to each weight nearly what the adapter does, and its error.

    Products are decomposed in factor space, other changes as matrices, in float64; the factors are float32, balanced,
    and their scaling is 1. Where a change depends on the weight it is W' − W of the base, under whose names the LoRA
    then is. Changes of biases are kept whole, as `lora_bias`; tensors trained whole stay what they are.

    Raises `IncompatibleAdapter` for changes that depend on a base where none is given, `UnsupportedAdapter` for a bias
    that is changed without its weight.
    """
    from loratools.surgery.change import measurable  # with torch, which no other conversion needs

    (changes,) = measurable([adapter], base)
    if open_ones := {**changes.left_out, **changes.in_part}:
        problems = [f"{module}: {why}" for module, why in open_ones.items() if module not in adapter.replacements]
        if problems:
            raise IncompatibleAdapter(
                f"{counted(len(problems), 'module')} whose change cannot be told", problems[:20],
                hint="Give the base model that it was trained on (--base).",
            )  # fmt: skip
    modules = {name: change for name, change in changes.modules.items() if name not in adapter.replacements}
    biases = {
        name.removesuffix(".bias"): change
        for name, change in modules.items()
        if name.endswith(".bias") and change.shape[1] == 1
    }
    if lonely := sorted(biases.keys() - modules.keys()):
        raise UnsupportedAdapter(
            "a LoRA changes no bias without its weight", [f"{module}.bias: changed alone" for module in lonely[:20]]
        )
    updates: dict[str, Update] = {}
    made: list[ModuleLora] = []
    lost2 = whole2 = 0.0
    for module, change in modules.items():
        if module.endswith(".bias") and module.removesuffix(".bias") in biases:
            continue
        delta = change.load()
        left, right, error, norm = _nearest(delta, rank)
        bias = biases.get(module)
        updates[module] = _update(module, _sides(module, change, adapter, base), left, right, bias)
        made.append(ModuleLora(module, change.kind, left.shape[1], error / norm if norm else 0.0))
        lost2, whole2 = lost2 + error**2, whole2 + norm**2
    if not updates:
        raise UnsupportedAdapter("it changes no weight of two sides or more, so there is nothing to make a LoRA of")
    overall = math.sqrt(lost2 / whole2) if whole2 else 0.0
    return (
        replace(adapter, updates=updates, settings=_settings(adapter), orientation={}),
        LoraError(rank, overall, tuple(made)),
    )


def _nearest(delta: Delta, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return balanced factors of at most a rank, ‖ΔW − left·right‖ and ‖ΔW‖."""
    svd, norm = delta.leading(min(rank, *delta.shape))
    kept = max(1, min(rank, int(svd.rank())))
    left, right, tail = svd.truncated(kept)
    # A product has all its singular values, so the error is that of those behind; of a matrix only some are known.
    known2 = float(svd.S.square().sum())
    beyond2 = norm**2 - known2
    rest2 = beyond2 if beyond2 > 1e-13 * norm**2 else 0.0
    return left, right, math.sqrt(float(tail) ** 2 + rest2), norm


def _sides(module: str, change: ModuleChange, adapter: Adapter, base: Checkpoint | None) -> tuple[int, ...]:
    """Return the shape of a module's weight: a kernel's sides are told by the update, or by the base."""
    known = [adapter.updates[module].shape] if module in adapter.updates else []
    stored = base.shapes.get(f"{module}.weight") if base is not None else None
    known += [stored] if stored else []
    return next((s for s in known if len(s) > 2 and (s[0], prod(s[1:])) == change.shape), change.shape)


def _update(
    module: str, shape: tuple[int, ...], left: torch.Tensor, right: torch.Tensor, bias: ModuleChange | None
) -> Update:
    rank = left.shape[1]
    import torch

    if len(shape) == 2 and is_embedding(module):
        kind = "embedding"
        parts: dict[str, torch.Tensor] = {part_names.A_EMBEDDING: left.mT, part_names.B_EMBEDDING: right.mT}
    else:
        kind = "conv" if len(shape) > 2 else "lora"
        parts = {
            part_names.A: right.reshape(rank, *shape[1:]), part_names.B: left.reshape(-1, rank, *(1,) * len(shape[2:])),
        }  # fmt: skip
    if bias is not None:
        delta = bias.load()
        parts[part_names.BIAS] = delta.times(torch.ones(1, 1, dtype=torch.float64)).flatten()
    lazy = {name: LazyTensor.of(tensor.float().contiguous()) for name, tensor in parts.items()}
    built: Update = kinds.get(kind).build(lazy, 1.0, float(rank))
    return built


def _settings(adapter: Adapter) -> Mapping[str, Any]:
    """Return the settings that a LoRA of the adapter has: not those of its type, nor its targets, told by modules."""
    kept = {name: value for name, value in adapter.settings.items() if name not in _DROPPED}
    if str(kept.get("bias", "")).endswith("_only"):
        kept["bias"] = "lora_only"
    return kept
