"""The difference of a normalization layer, w' = w + w_norm and b' = b + b_norm (LyCORIS' `train_norm`); no alpha."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter.kinds.full import FullUpdate
from loratools.storage.lazy import LazyTensor

_NAMES = ("w_norm", "b_norm")


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is the difference of a normalization layer."""
    return _NAMES[0] in parts and parts.keys() <= set(_NAMES)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> FullUpdate:
    """Return the update; it has no scaling."""
    return FullUpdate(parts[_NAMES[0]], parts.get(_NAMES[1]), _NAMES, "norm")
