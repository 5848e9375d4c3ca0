"""Which modules are plain where one of them is: projections that a runtime fuses, and the experts of a layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.surgery.merge.siblings import with_siblings
from tests.surgery.models import lora, save_adapter

L0, L1 = "model.layers.0.", "model.layers.1."
ATTENTION = [f"{layer}self_attn.{name}_proj" for layer in (L0, L1) for name in "qkvo"]
MLP = [f"{layer}mlp.{name}_proj" for layer in (L0, L1) for name in ("gate", "up", "down")]
EXPERTS = [f"{layer}mlp.experts.{n}.{name}_proj" for layer in (L0, L1) for n in (0, 1) for name in ("gate", "down")]
STACKS = [f"{layer}mlp.experts.{name}_proj" for layer in (L0, L1) for name in ("gate_up", "down")]
OTHERS = [f"{L0}mlp.shared_experts.gate_proj", f"{L0}mlp.gate", "lm_head", f"{L0}x.w1", f"{L0}x.w2", f"{L0}x.w3"]
EVERY = [*ATTENTION, *MLP, *EXPERTS, *STACKS, *OTHERS]


@pytest.mark.parametrize(
    ("touched", "siblings"),
    [
        ([f"{L0}self_attn.q_proj"], [f"{L0}self_attn.{name}_proj" for name in "qkv"]),
        ([f"{L1}self_attn.o_proj", f"{L0}mlp.down_proj"], [f"{L1}self_attn.o_proj", f"{L0}mlp.down_proj"]),
        ([f"{L0}mlp.up_proj"], [f"{L0}mlp.gate_proj", f"{L0}mlp.up_proj"]),
        ([f"{L0}mlp.gate"], [f"{L0}mlp.gate"]),
        ([f"{L1}mlp.experts.1.down_proj"], [path for path in [*EXPERTS, *STACKS] if path.startswith(L1)]),
        ([f"{L0}mlp.experts.down_proj"], [path for path in [*EXPERTS, *STACKS] if path.startswith(L0)]),
        ([f"{L0}x.w3"], [f"{L0}x.w1", f"{L0}x.w3"]),
        (["lm_head"], ["lm_head"]),
        ([], []),
    ],
)
def test_siblings(touched: list[str], siblings: list[str]) -> None:
    assert with_siblings(touched, EVERY) == set(siblings)


@pytest.mark.parametrize("stated", [True, False])
def test_a_partial_merge_writes_them_in_16_bit(tmp_path: Path, stated: bool) -> None:
    """Where config.json states a method, which runtimes with fused weights go by."""
    paths = [f"{L0}self_attn.{name}_proj" for name in "qkvo"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in paths:
        tensors[f"{path}.weight"] = torch.randn(16, 16, generator=generator).to(torch.float8_e4m3fn)
        tensors[f"{path}.weight_scale_inv"] = torch.tensor(0.5)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}} if stated else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    adapter = save_adapter(tmp_path / "lora", lora({f"{L0}self_attn.k_proj": (16, 16)}))
    report = loratools.merge(tmp_path / "base", adapter, tmp_path / "out", quantized="partial")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    plain = {path for path in paths if merged[f"{path}.weight"].dtype == torch.bfloat16}
    assert plain == (set(paths[:3]) if stated else {paths[1]})
    assert any("2 unchanged, for a runtime stores them in one weight" in note for note in report.notes) == stated
    for path in plain - {paths[1]}:
        assert torch.equal(merged[f"{path}.weight"], (tensors[f"{path}.weight"].float() / 2).bfloat16())
    if stated:
        written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert set(written["modules_to_not_convert"]) >= plain


@pytest.mark.parametrize("policy", ["partial", "dequantize", "requantize"])
@pytest.mark.parametrize("every", [True, False])
def test_scales_of_a_cache_stay_in_a_quantized_model(tmp_path: Path, policy: str, every: bool) -> None:
    """They lie beside k and v, and are not of their weights; with the last of the codes they go."""
    paths = [f"{L0}self_attn.{name}_proj" for name in ("qkv" if every else "qkvo")]
    tensors = {f"{paths[1]}.k_scale": torch.ones(()), f"{paths[2]}.v_scale": torch.ones(())}
    for i, path in enumerate(paths):
        W = torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        tensors |= {f"{path}.weight": W.to(torch.float8_e4m3fn), f"{path}.weight_scale": torch.tensor(0.5)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["x"]}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(tmp_path / "lora", lora({paths[1]: (16, 16)}))
    loratools.merge(tmp_path / "base", adapter, tmp_path / "out", quantized=policy)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert (f"{paths[1]}.k_scale" in merged) == (f"{paths[2]}.v_scale" in merged) == (policy != "dequantize")
    assert loratools.verify(tmp_path / "out", tmp_path / "base", adapter).ok
