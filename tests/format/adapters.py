"""Adapters in memory, and what to compare them by."""

from __future__ import annotations

from typing import Any

import torch

from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.storage.lazy import LazyTensor

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
ZERO = "blake3:" + "0" * 64


def lora(
    seed: int, rank: int = 4, alpha: float = 8, scaling: float = 2.0, dtype: torch.dtype = torch.float32
) -> kinds.Update:
    """Return an update of a (12, 10) weight."""
    generator = torch.Generator().manual_seed(seed)
    A = LazyTensor.of(torch.randn(rank, 10, generator=generator).to(dtype))
    B = LazyTensor.of(torch.randn(12, rank, generator=generator).to(dtype))
    built: kinds.Update = kinds.get("lora").build({"lora_A.weight": A, "lora_B.weight": B}, scaling, alpha)
    return built


def rich() -> Adapter:
    """Return an adapter that uses every field of the manifest but extensions."""
    head = torch.randn(7, 10, generator=torch.Generator().manual_seed(9))
    return Adapter(
        updates={Q: lora(0), V: lora(1, rank=3, alpha=8, scaling=8 / 3**0.5, dtype=torch.bfloat16)},
        replacements={"lm_head.weight": LazyTensor.of(head.half())},
        base=BaseIdentity("org/base", "abc", ZERO, {f"{Q}.weight": ZERO, f"{V}.weight": ZERO}, ZERO),
        provenance=(
            Step("train", "peft 0.21.2"),
            Step("combine", "loratools", {"method": "linear"}, ({"digest": ZERO, "weight": -0.5},), seed=3),
        ),
        settings={"task_type": "CAUSAL_LM"},
    )


def bytes_of(adapter: Adapter) -> dict[str, tuple[str, Any]]:
    """Return name -> (dtype, numbers) of every tensor."""
    return {name: (lazy.dtype, lazy.load().double().tolist()) for name, lazy in adapter.tensors().items()}
