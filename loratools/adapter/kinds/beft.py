"""BEFT: b' = b + v, the weight stays (arXiv 2509.15974), as in PEFT; it stands on a bias as `full` on a weight."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter.kinds.full import FullUpdate
from loratools.storage.lazy import LazyTensor

PART = "beft_bias"


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are numbers for a bias."""
    return parts.keys() == {PART}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> FullUpdate:
    """Return the update of (1, out) or (out,) numbers; it has no scaling."""
    numbers = parts[PART]
    if numbers.parameters != max(numbers.shape, default=0):
        raise ValueError(f"{PART} has shape {numbers.shape}, expected (1, out)")
    return FullUpdate(numbers.reshaped((numbers.parameters,)), None, (PART, ""), "beft")
