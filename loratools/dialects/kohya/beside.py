"""Parts that change another parameter than their module's weight, or the weight beside its factors: taken apart.

X.diff beside factors    W' = W + s·B·A + diff: the difference is an update of X.weight of its own
X.diff_b                 b' = b + diff_b: that of B beside two factors (`finish`), else an update of X.bias
X.b_norm alone           b' = b + b_norm: an update of X.bias
X.diff_m                 a difference of the parameter X.modulation (Wan)
X.set_weight             takes the place of X.weight; X.scale of Flux' norms of q and k
X.reshape_weight         the shape (out, in) that ComfyUI widens a base's weight to: that of the factors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from loratools.adapter.kinds.full import WEIGHT_PART
from loratools.adapter.model import Adapter
from loratools.adapter.parts import A, B
from loratools.decisions import warned
from loratools.dialects._frame.build import Draft, some
from loratools.dialects._frame.numbers import read_whole_numbers
from loratools.storage.lazy import LazyTensor

MODULATION_PART, MODULATION = "diff_m", "modulation"
SET_PART, SHAPE_PART = "set_weight", "reshape_weight"
WIDENED = "reshape_weight"
"""Setting of an adapter: the modules whose base weight ComfyUI has to widen."""
_NORM_BIAS, _NORM_WEIGHT = "b_norm", "w_norm"


@dataclass(frozen=True, slots=True)
class Beside:
    """What is no part of an update: tensors that take the place of the base's, by path, and widened modules."""

    replacements: Mapping[str, LazyTensor]
    widened: tuple[str, ...]

    @property
    def settings(self) -> dict[str, list[str]]:
        """The setting that says which modules are widened; {} where none is."""
        return {WIDENED: list(self.widened)} if self.widened else {}


def take_apart(draft: Draft) -> Beside:
    """Take out of a draft's modules what changes other parameters, and give each of these an update of its own."""
    replacements: dict[str, LazyTensor] = {}
    widened, doubled = [], []
    for module, parts in list(draft.groups.items()):
        if MODULATION_PART in parts:
            draft.add(f"{module}.{MODULATION}", WEIGHT_PART, parts.pop(MODULATION_PART), f"{module}.{MODULATION_PART}")
        if _NORM_BIAS in parts and _NORM_WEIGHT not in parts:
            draft.add(f"{module}.bias", WEIGHT_PART, parts.pop(_NORM_BIAS), f"{module}.{_NORM_BIAS}")
        if SET_PART in parts:
            replacements[_parameter(module)] = parts.pop(SET_PART)
        if SHAPE_PART in parts and {A, B} <= parts.keys():
            wanted = read_whole_numbers(parts.pop(SHAPE_PART), f"{draft.path}: {module}.{SHAPE_PART}")
            shape = parts[B].shape[0], prod(parts[A].shape[1:])
            if (wanted[0], prod(wanted[1:])) != shape:
                draft.faults.append(f"{module}: {SHAPE_PART} says {wanted}, its factors are for {shape}")
            widened.append(module)
        if WEIGHT_PART in parts and not parts.keys().isdisjoint((A, B)):
            draft.add(f"{module}.weight", WEIGHT_PART, parts.pop(WEIGHT_PART), f"{module}.{WEIGHT_PART}")
            doubled.append(module)
        if not parts:
            del draft.groups[module]
    if doubled:
        why = "both are added, ComfyUI takes the difference alone"
        warned(
            "%s: %s: factors and a whole difference (diff) of one weight; %s", draft.path, some(sorted(doubled)), why
        )
    return Beside(replacements, tuple(widened))


def shapes_of(adapter: Adapter) -> dict[str, LazyTensor]:
    """Return module -> `reshape_weight` for the modules that ComfyUI has to widen in the base."""
    modules = adapter.settings.get(WIDENED) or ()
    return {module: _numbers(adapter.updates[module].shape) for module in modules if module in adapter.updates}


def _parameter(module: str) -> str:
    """Return the parameter of a module that is set; Flux' norms of q and k have it as `scale`."""
    return f"{module}.scale" if module.endswith((".norm.query_norm", ".norm.key_norm")) else f"{module}.weight"


def _numbers(values: tuple[int, ...]) -> LazyTensor:
    import torch

    return LazyTensor.of(torch.tensor(values))
