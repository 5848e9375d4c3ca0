"""Adapters to write, and files as PEFT and its users leave them, made with the safetensors library and torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.decisions import warnings_to
from loratools.storage.lazy import LazyTensor

OUT, IN = 12, 10
Q0, Q1, V0 = (f"model.layers.{place}_proj" for place in ("0.self_attn.q", "1.self_attn.q", "0.self_attn.v"))


def factors(seed: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random A (rank, IN) and B (OUT, rank)."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, IN, generator=generator).to(dtype)
    return A, torch.randn(OUT, rank, generator=generator).to(dtype)


def opened(path: Path) -> tuple[Adapter, list[str]]:
    """Open an adapter; return it and every warning that was said of it."""
    warnings: list[str] = []
    with warnings_to(warnings.append):
        return dialects.open_adapter(path), warnings


def lora(seed: int, rank: int = 4, alpha: float = 8, scaling: float | None = None, **options: Any) -> kinds.Update:
    """Return an update in memory; s = alpha/rank unless it is given."""
    A, B = factors(seed, rank, **options)
    parts = {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}
    built: kinds.Update = kinds.get("lora").build(parts, alpha / rank if scaling is None else scaling, alpha)
    return built


def samples() -> dict[str, Adapter]:
    """Return adapters that any dialect of plain LoRA might be asked to write."""
    base = BaseIdentity("org/base")
    return {
        "plain": Adapter({Q0: lora(0), V0: lora(1)}, base=base, settings={"task_type": "CAUSAL_LM"}),
        "ranks": Adapter({Q0: lora(2, 2, 2), Q1: lora(3, 4, 16), V0: lora(4, 4, 16)}),
        "rslora": Adapter({Q0: lora(5, 2, 8, 8 / 2**0.5), V0: lora(6, 3, 8, 8 / 3**0.5)}),
        "scaling": Adapter({Q0: lora(7, 4, 8, 0.1), V0: lora(8, 4, 8, -1.7)}),
        "bf16": Adapter({Q0: lora(9, dtype=torch.bfloat16)}, base=base),
    }


def state(prefix: str = "base_model.model.", middle: str = "", rank: int = 4) -> dict[str, torch.Tensor]:
    """Return a PEFT state dict on Q0, Q1 and V0; `middle` stands between `lora_A` and `.weight`."""
    tensors = {}
    for seed, module in enumerate((Q0, Q1, V0)):
        A, B = factors(seed, rank)
        tensors |= {f"{prefix}{module}.lora_A{middle}.weight": A, f"{prefix}{module}.lora_B{middle}.weight": B}
    return tensors


CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}


def write_config(folder: Path, **changes: Any) -> None:
    """Write `CONFIG` with changes; a value `...` takes the field out."""
    fields = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def peft_folder(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Write a PEFT adapter as the real library would."""
    write_config(folder, **changes)
    tensors = state() if tensors is None else dict(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def fingerprint(path: Path) -> dict[str, str]:
    """Return name -> digest of every file at a path."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def expect(adapter: Adapter, module: str, seed: int, scaling: float, rank: int = 4) -> None:
    """Assert that a module's ΔW is s·B·A of the factors of a seed, against float64."""
    A, B = factors(seed, rank)
    wanted = scaling * (B.double() @ A.double())
    torch.testing.assert_close(adapter.updates[module].delta_weight().double(), wanted, rtol=1e-6, atol=1e-6)
