"""Adapters in Megatron's layout, and what they are in transformers'.

No exporter of NeMo runs without its GPU stack, so files are made by hand: names and archive as NeMo 1.x has them
(`merge_lora_weights/merge.py`, `NLPSaveRestoreConnector`), configuration and canonical names as Megatron-Bridge 0.3.1.
Factors are small whole numbers, whose products float32 has exactly: every ΔW is compared bit by bit.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from loratools.adapter.model import Adapter
from loratools.storage.checkpoint import Checkpoint

HIDDEN, HEADS, GROUPS, HEAD, FFN, RANK, ALPHA = 16, 6, 2, 4, 10, 3, 12.0
ROWS = {"qkv": (HEADS + 2 * GROUPS) * HEAD, "proj": HIDDEN, "fc1": 2 * FFN, "fc2": HIDDEN}
COLUMNS = {"qkv": HIDDEN, "proj": HEADS * HEAD, "fc1": HIDDEN, "fc2": FFN}
NEMO = {
    "qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "fc1": "mlp.adapter_layer.lora_hto4h_adapter", "fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}  # fmt: skip
BRIDGE = {
    "qkv": "self_attention.linear_qkv.adapter", "proj": "self_attention.linear_proj.adapter",
    "fc1": "mlp.linear_fc1.adapter", "fc2": "mlp.linear_fc2.adapter",
}  # fmt: skip
MODEL = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "kv_channels": HEAD, "hidden_size": HIDDEN}
NEMO_CONFIG: dict[str, Any] = {
    **MODEL, "activation": "fast-swiglu", "tensor_model_parallel_size": 1,
    "peft": {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": RANK, "alpha": ALPHA}},
}  # fmt: skip
RUN_CONFIG: dict[str, Any] = {
    "model": {**MODEL, "gated_linear_unit": True}, "peft": {"dim": RANK, "alpha": 12},
}  # fmt: skip


def factors(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole-numbered linear_in (r, in) and linear_out (out, r)."""
    generator = torch.Generator().manual_seed(seed)
    sides = (RANK, COLUMNS[kind]), (ROWS[kind], RANK)
    A, B = (torch.randint(-8, 9, side, generator=generator).float() for side in sides)
    return A, B


def state(names: dict[str, str], prefix: str, layers: int = 2) -> dict[str, torch.Tensor]:
    found = {}
    for layer in range(layers):
        for seed, (kind, name) in enumerate(names.items()):
            A, B = factors(kind, 10 * layer + seed)
            path = f"{prefix}layers.{layer}.{name}"
            found |= {f"{path}.linear_in.weight": A, f"{path}.linear_out.weight": B}
    return found


def by_megatron(mixed: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
    """Take linear_qkv's rows apart as Megatron's attention does with its output (`get_query_key_value_tensors`)."""
    each = HEADS // GROUPS
    query, key, value = torch.split(mixed.view(GROUPS, (each + 2) * HEAD, -1), [each * HEAD, HEAD, HEAD], dim=1)
    parts = {"q_proj": query.reshape(HEADS * HEAD, -1), "k_proj": key, "v_proj": value}
    return {f"{layer}.self_attn.{name}": rows.reshape(-1, mixed.shape[1]) for name, rows in parts.items()}


def wanted(scaling: float, layers: int = 2) -> dict[str, torch.Tensor]:
    """Return transformers' module -> ΔW, in float64."""
    found: dict[str, torch.Tensor] = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        delta = {}
        for seed, kind in enumerate(NEMO):
            A, B = factors(kind, 10 * number + seed)
            delta[kind] = scaling * (B.double() @ A.double())
        found |= by_megatron(delta["qkv"], layer)
        found[f"{layer}.self_attn.o_proj"], found[f"{layer}.mlp.down_proj"] = delta["proj"], delta["fc2"]
        found[f"{layer}.mlp.gate_proj"], found[f"{layer}.mlp.up_proj"] = delta["fc1"].chunk(2)
    return found


def expect(adapter: Adapter, deltas: dict[str, torch.Tensor]) -> None:
    assert adapter.dialect == "megatron"
    assert adapter.updates.keys() == deltas.keys()
    for module, delta in deltas.items():
        assert torch.equal(adapter.updates[module].delta_weight().double(), delta), module


def nemo(path: Path, tensors: Any, config: dict[str, Any] | None, mode: str = "w:", name: str = "") -> Path:
    """Write an archive as NeMo 1.x does, by `tar.add(folder, arcname=".")`, which puts `./` before its names."""
    memory = io.BytesIO()
    torch.save(tensors, memory)
    members = {name or "model_weights.ckpt": memory.getvalue()}
    if config is not None:
        members["model_config.yaml"] = yaml.safe_dump(config).encode()
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member, data in members.items():
            info = tarfile.TarInfo(f"./{member}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def bridge(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = RUN_CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter.safetensors")
    if config is not None:
        (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def base(folder: Path, gate: bool = True, **config: Any) -> Checkpoint:
    folder.mkdir()
    name = "gate_proj" if gate else "up_proj"
    save_file({f"model.layers.0.mlp.{name}.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)
