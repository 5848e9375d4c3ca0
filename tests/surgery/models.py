"""Models and adapters of any shape on disk, and the merge of them in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True, eq=False)
class Lora:
    """Factors by module, their scaling and the weight at which they are merged."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float = 8.0
    weight: float = 1.0
    settings: Mapping[str, object] = field(default_factory=dict)

    def delta(self, module: str) -> Tensor:
        """Return w·s·B·A in float64."""
        A, B = self.factors[module]
        return self.weight * self.alpha / len(A) * (B.double() @ A.double())


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers; the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def lora(
    shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 1, scale: float = 0.1, **rest: object
) -> Lora:
    """Return random float32 factors for modules of shape (out, in)."""
    factors = {
        module: (random(rank, inner, seed=seed + i, scale=scale), random(out, rank, seed=seed + i + 500, scale=scale))
        for i, (module, (out, inner)) in enumerate(shapes.items())
    }
    return Lora(factors, **rest)  # type: ignore[arg-type]


def save_base(folder: Path, weights: Mapping[str, Tensor], shards: int = 1, **config: object) -> Path:
    """Write a model: one file, or shards with an index; config.json if anything is to be in it."""
    folder.mkdir(parents=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in sorted(set(weight_map.values())):
        save_file({name: W for name, W in weights.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(W.nbytes for W in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_adapter(folder: Path, given: Lora) -> Path:
    """Write PEFT's two files."""
    folder.mkdir(parents=True)
    rank = len(next(iter(given.factors.values()))[0])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": given.alpha, "target_modules": list(given.factors)}
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(given.settings)))
    tensors = {}
    for module, (A, B) in given.factors.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merged(
    weights: Mapping[str, Tensor], adapters: Sequence[Lora], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return W + Σ w·s·B·A in float64, rounded once; module names are tensor names without `.weight`."""
    found = {}
    for name, W in weights.items():
        total = sum(
            (one.delta(m) for one in adapters if (m := name.removesuffix(".weight")) in one.factors), W.double()
        )
        found[name] = total.to(dtype or W.dtype) if W.is_floating_point() else W
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether dtype, shape and every bit agree."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
    )


def units_off(found: Tensor, wanted: Tensor) -> Tensor:
    """Return how many floats of their dtype lie between two tensors, element by element."""

    def ordinal(values: Tensor) -> Tensor:
        bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]).long()
        lowest = -(1 << (8 * values.itemsize - 1))
        return torch.where(bits < 0, lowest - bits, bits)

    assert found.dtype == wanted.dtype
    return (ordinal(found) - ordinal(wanted)).abs()


def save(folder: Path, weights: dict[str, Tensor], adapters: list[Lora], **options: object) -> tuple[Path, list[Path]]:
    """Write a base and adapters for it; return where they are."""
    base = save_base(folder / "base", weights, **options)  # type: ignore[arg-type]
    return base, [save_adapter(folder / f"adapter{i}", one) for i, one in enumerate(adapters)]


def weights_of(shapes: dict[str, tuple[int, int]], dtype: torch.dtype, scale: float = 0.05) -> dict[str, Tensor]:
    """Return random weights of modules."""
    return {
        f"{name}.weight": random(*shape, seed=i, scale=scale, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
