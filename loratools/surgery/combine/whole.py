"""What adapters hold beside products, combined by stated rules: tensors trained whole, and biases of factors.

A tensor trained whole, Wᵢ in place of W, stands for the change Wᵢ − W. Then W + Σ wᵢ·(Wᵢ − W) = Σ wᵢ·Wᵢ where the
weights of the adapters that bring it sum to 1; else the base is needed, which is not at hand, and the tensor is refused
by name. A bias of B adds s·c to a module's bias, so biases add up as Σ wᵢ·sᵢ·cᵢ, with every method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter.kinds import Update
from loratools.adapter.naming.compact import compact
from loratools.adapter.parts import B
from loratools.errors import UnsupportedAdapter, counted
from loratools.storage import dtypes
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine.inputs import Aligned, Input

if TYPE_CHECKING:
    from torch import Tensor

Weighted = tuple[str, float, LazyTensor]
"""(name of the adapter, its weight, the tensor)"""


def replacements(inputs: Sequence[Input], aligned: Aligned, method: str) -> dict[str, LazyTensor]:
    """Return path -> tensor for everything that the adapters replace whole.

    A tensor that one adapter brings, with weight 1, stays as it is, byte for byte. Raises `UnsupportedAdapter` with
    every tensor that cannot be combined, and why.
    """
    replaced: dict[str, list[Weighted]] = {}
    for number, each in enumerate(inputs):
        for own, lazy in each.adapter.replacements.items():
            replaced.setdefault(aligned.path(number, own), []).append((each.name, each.weight.of(own), lazy))
    kept: dict[str, LazyTensor] = {}
    problems: dict[str, list[str]] = {}
    for path, group in replaced.items():
        if reason := _refusal(group, method) or _not_finite(group):
            problems.setdefault(reason, []).append(path)
        else:
            kept[path] = _sum(group)
    if problems:
        raise UnsupportedAdapter(
            f"{counted(sum(map(len, problems.values())), 'tensor')} "
            f"trained whole cannot be combined without the base model",
            [f"{', '.join(compact(paths))}: {reason}" for reason, paths in problems.items()],
            hint="W + sum of w (W_i - W) needs no base where the weights sum to 1. Or merge into the base model.",
        )
    return kept


def biases(inputs: Sequence[Input], aligned: Aligned, dtype: str) -> dict[str, Tensor]:
    """Return module -> Σ wᵢ·sᵢ·cᵢ, rounded to `dtype`; empty where no update has a bias.

    PEFT's `lora_bias` is one switch for all modules, so where one has a bias all that can have one get one.
    """
    modules = aligned.modules
    if not any(member.update.bias for members in modules.values() for member in members):
        return {}
    import torch

    totals = {}
    for module, members in modules.items():
        if B in members[0].update.parts:
            total = torch.zeros(members[0].update.shape[0], dtype=torch.float64)
            for member in members:
                if (c := member.update.bias) is not None:
                    total += inputs[member.adapter].weight.of(module) * member.update.scaling * c.load().double()
            totals[module] = total.to(dtypes.to_torch(dtype))
    return totals


def only_bias(like: Update, bias: Tensor) -> Update:
    """Return an update of the weight of `like` that changes nothing but the bias: of rank 1, for no rank is 0."""
    rows, columns = like.shape[0], prod(like.shape[1:])
    left, right = LazyTensor.of(bias.new_zeros(rows, 1)), LazyTensor.of(bias.new_zeros(1, columns))
    return like.with_factors(left, right, LazyTensor.of(bias))


def _refusal(group: Sequence[Weighted], method: str) -> str | None:
    who = " and ".join(name for name, _, _ in group)
    total = math.fsum(weight for _, weight, _ in group)
    if len({lazy.shape for _, _, lazy in group}) > 1:
        return f"of different shapes in {who}"
    if abs(total - 1) > 1e-9:
        return f"trained whole in {who}, with weights that sum to {total:g}, not 1"
    if len(group) > 1 and method != "linear":
        return f"trained whole in {who}; method {method} is for products only"
    return None


def _not_finite(group: Sequence[Weighted]) -> str | None:
    from loratools.storage.codecs.floats import is_finite

    odd = [who for who, _, lazy in group if not is_finite(lazy.chunks(who), lazy.dtype)]
    return f"NaN or infinite numbers in {' and '.join(odd)}" if odd else None


def _sum(group: Sequence[Weighted]) -> LazyTensor:
    (_, weight, first), *rest = group
    if not rest and weight == 1:
        return first
    same = {lazy.dtype for _, _, lazy in group} == {first.dtype} and first.dtype in dtypes.FLOATS
    dtype = first.dtype if same else "F32"

    def load() -> Tensor:
        import torch

        total = torch.zeros(first.shape, dtype=torch.float64)
        for _, w, lazy in group:
            total += w * lazy.load().double()
        return total.to(dtypes.to_torch(dtype))

    return LazyTensor(dtype, first.shape, load, file=first.file)
