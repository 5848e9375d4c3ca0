"""A deterministic small model and adapters for it: the same bytes on every machine, whatever random numbers become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.surgery.models import DTYPES, Lora, save_adapter, save_base

SHAPES = {"a": (96, 160), "b": (64, 96), "c": (33, 47), "d": (40, 72)}


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return numbers in [−scale, scale) in float32, from a multiplicative hash of their position."""
    count = int(np.prod(shape))
    mixed = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503)) % np.uint64(
        1 << 32
    )
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
    values = (mixed >> np.uint64(8)).astype(np.float64) / (1 << 23) - 1  # 24 bits: float32 has them exactly
    return torch.from_numpy((values * scale).astype(np.float32).reshape(shape))


def factors(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            numbers(rank, shape[1], seed=seed + i, scale=0.25),
            numbers(shape[0], rank, seed=seed + 50 + i, scale=0.25),
        )
        for i, (name, shape) in enumerate(shapes.items())
    }


def base(folder: Path, dtype: str) -> Path:
    """Write the model, in one dtype."""
    weights = {
        f"{name}.weight": numbers(*shape, seed=i).to(DTYPES[dtype]) for i, (name, shape) in enumerate(SHAPES.items())
    }
    return save_base(folder, weights)


def loras() -> tuple[Lora, Lora]:
    """Return two LoRA, one on a, c and d, the other on a, with the weights at which they are merged."""
    return (
        Lora(factors({name: SHAPES[name] for name in "acd"}, 5, 200), alpha=3.0, weight=0.7),
        Lora(factors({"a": SHAPES["a"]}, 16, 300), alpha=7.0, weight=-0.3),
    )


def adapters(folder: Path) -> tuple[list[Path], list[float]]:
    """Write a DoRA on b and the two LoRA, and return their paths and weights."""
    dora = Lora(factors({"b": SHAPES["b"]}, 4, 100), alpha=6.0, settings={"use_dora": True})
    path = save_adapter(folder / "dora", dora) / "adapter_model.safetensors"
    magnitude = numbers(SHAPES["b"][0], seed=7, scale=2.0).abs() + 4
    tensors = load_file(path) | {"base_model.model.b.lora_magnitude_vector": magnitude}
    save_file(tensors, path, {"format": "pt"})
    one, two = loras()
    paths = [path.parent, save_adapter(folder / "one", one), save_adapter(folder / "two", two)]
    return paths, [1.0, one.weight, two.weight]
