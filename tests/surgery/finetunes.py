"""Small bases and fine-tunes whose difference is known in float64, and what an extracted adapter makes of the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loratools.surgery.merge import merge
from tests.surgery.models import load, random, save_base

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
V, H, INNER = 40, 24, 36


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, bias: bool = False) -> dict[str, Tensor]:
    """Return a block of a Llama under its names; the head of its own unless `tied`, biases on q_proj if asked for."""
    weights = {
        "model.embed_tokens.weight": random(V, H, seed=1, dtype=dtype),
        "model.layers.0.self_attn.q_proj.weight": random(H, H, seed=2, dtype=dtype),
        "model.layers.0.mlp.up_proj.weight": random(INNER, H, seed=3, dtype=dtype),
        "model.layers.0.mlp.down_proj.weight": random(H, INNER, seed=4, dtype=dtype),
        "model.layers.0.input_layernorm.weight": torch.ones(H, dtype=dtype),
        "model.norm.weight": torch.ones(H, dtype=dtype),
    }
    weights |= {} if tied else {"lm_head.weight": random(V, H, seed=5, dtype=dtype)}
    return weights | ({"model.layers.0.self_attn.q_proj.bias": random(H, seed=6, dtype=dtype)} if bias else {})


def moved(weights: Mapping[str, Tensor], *names: str, rank: int = 3, scale: float = 0.05) -> dict[str, Tensor]:
    """Return the weights with a change in these tensors (ends of names): of this rank where they are matrices."""
    tuned = dict(weights)
    for i, name in enumerate(sorted(weights)):
        if any(name.endswith(end) for end in names):
            W = weights[name]
            if W.ndim < 2:
                delta = random(*W.shape, seed=50 + i)
            else:
                flat = W.flatten(1)
                delta = random(len(flat), rank, seed=50 + i) @ random(rank, flat.shape[1], seed=90 + i)
            tuned[name] = (W.double() + scale * delta.double().view(W.shape)).to(W.dtype)
    return tuned


def pair(
    folder: Path, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, shards: int = 1, after: int = 1,
    **config: object,
) -> tuple[Path, Path]:  # fmt: skip
    """Write base and fine-tune, in so many shards each, and return their folders."""
    settings = LLAMA | config
    return (
        save_base(folder / "base", base, shards, **settings),
        save_base(folder / "tuned", tuned, after, **settings),
    )


def restored(base: Path, adapter: Path, output: Path, **options: object) -> dict[str, Tensor]:
    """Return every tensor of base + adapter, made by `merge`."""
    merge(base, [adapter], output, retention="off", **options)  # type: ignore[arg-type]
    return load(output)


def optimum(D: Tensor, rank: int) -> float:
    """Return ‖D − D_r‖_F for the best D_r of rank r, from all singular values in float64."""
    return float(torch.linalg.svdvals(D.double())[rank:].square().sum().sqrt())
