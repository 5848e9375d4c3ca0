"""Adapters in memory, and their placements applied by hand in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import resolve
from loratools.storage.lazy import LazyTensor

Arrays = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


def lora(out: int, inner: int, rank: int = 2, seed: int = 0, scaling: float = 0.5) -> kinds.Update:
    """Return an update with random float64 factors."""
    generator = torch.Generator().manual_seed(seed + 1000 * out + inner)
    A = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    parts = {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}
    built: kinds.Update = kinds.get("lora").build(parts, scaling, scaling * rank)
    return built


def adapter(shapes: Mapping[str, tuple[int, int]], **settings: Any) -> Adapter:
    """Return an adapter with an update of (out, in) for each module."""
    return Adapter(
        {module: lora(*shape, seed=i) for i, (module, shape) in enumerate(shapes.items())}, settings=settings
    )


def delta(update: kinds.Update) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return s·B·A in float64."""
    A, B = (lazy.load().numpy() for lazy in update.parts.values())
    found: np.ndarray[Any, np.dtype[np.float64]] = update.scaling * (B @ A)
    return found


def random_base(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Return random tensors of these shapes."""
    generator = np.random.default_rng(3)
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


def merge_by_hand(base: Arrays, given: Adapter, config: Mapping[str, Any] | None = None) -> Arrays:
    """Apply the placements that `resolve` finds, rectangle by rectangle."""
    merged = {name: W.copy() for name, W in base.items()}
    for placement in resolve(given, {name: W.shape for name, W in base.items()}, config):
        site, change = placement.site, delta(placement.update)
        change = change.reshape(change.shape[0], -1)[site.part_rows]
        matrix = merged[site.tensor].reshape(site.matrix)
        matrix[slice(*site.rows), slice(*site.columns)] += change.T if site.transposed else change
    return merged
