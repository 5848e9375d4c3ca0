"""A model of tens of megabytes, so that a merge has a middle in which things can go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.make import tiny

SIDE, LAYERS = 768, 8


@pytest.fixture(scope="session")
def sizeable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (19 MB of bf16 in three shards, a tokenizer, a card) and `adapter` (rank 4, half of it)."""
    folder = tmp_path_factory.mktemp("sizeable")
    generator = torch.Generator().manual_seed(0)
    weights, factors = {}, {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            module = f"model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.weight"] = (torch.randn(SIDE, SIDE, generator=generator) * 0.05).bfloat16()
            if name == "q_proj":
                A, B = torch.randn(2, 4, SIDE, generator=generator) * 0.1
                factors[module] = (A, B.T.contiguous())
    base = folder / "base"
    base.mkdir()
    names, weight_map = list(weights), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = names[len(names) * i // 3 : len(names) * (i + 1) // 3]
        save_file({name: weights[name] for name in part}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (base / "tokenizer.json").write_text(json.dumps({"vocab": list(range(20_000))}))
    (base / "README.md").write_text("# A base\n")
    tiny.save_peft(folder / "adapter", factors)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with `base` (two shards), `adapter`, and nothing else."""
    tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors())
    return tmp_path
