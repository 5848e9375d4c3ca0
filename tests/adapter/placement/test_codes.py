"""Adapters on quantized modules: refused by the scheme's name, whatever names the base stores its codes under."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.errors import IncompatibleAdapter
from loratools.surgery.compare import compare
from loratools.surgery.convert import convert
from loratools.surgery.dequantize import dequantize
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify
from tests.surgery.models import load, lora, random, same_bytes, save_adapter, save_base

N = 16
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EXL3: dict[str, Tensor] = {
    f"{Q}.trellis": torch.zeros(1, 1, 64, dtype=torch.int16),
    f"{Q}.suh": random(N, dtype=torch.float16) * 1e-7, f"{Q}.svh": random(N, dtype=torch.float16),
}  # fmt: skip
PLAIN = {f"{K}.weight": random(N, N, dtype=torch.bfloat16), "lm_head.weight": random(9, N, dtype=torch.bfloat16)}
STATED = {"quant_method": "exl3", "bits": 4}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", EXL3 | PLAIN, model_type="llama", quantization_config=STATED)


def test_every_verb_refuses_by_name_before_it_looks_for_names(base: Path, tmp_path: Path) -> None:
    on_q = save_adapter(tmp_path / "q", lora({Q: (N, N)}))
    on_k = save_adapter(tmp_path / "k", lora({K: (N, N)}))
    out = tmp_path / "out"
    verbs = {
        "merge": lambda: merge(base, on_q, out),
        "merge, the second": lambda: merge(base, [on_k, on_q], out),
        "verify": lambda: verify(base, base, on_q),
        "unmerge": lambda: unmerge(base, on_q, out),
        "switch": lambda: switch(base, on_k, on_q, out),
        "compare": lambda: compare(on_q, on_q, base),
        "convert": lambda: convert(on_q, out, base=base),
    }
    for verb, run in verbs.items():
        with pytest.raises(
            IncompatibleAdapter, match=r"is quantized with EXL3 \(config.json: exl3, 4 bits\)"
        ) as refusal:
            run()
        assert refusal.value.problems == (f"{Q}: EXL3",), verb
        assert "unquantized" in str(refusal.value.hint)
        assert not out.exists()


def test_modules_that_are_stored_plain_are_merged(base: Path, tmp_path: Path) -> None:
    adapter = lora({K: (N, N)})
    path = save_adapter(tmp_path / "k", adapter)
    merge(base, path, tmp_path / "out", dtype="F32")
    merged = load(tmp_path / "out")
    assert all(same_bytes(merged[name], codes) for name, codes in EXL3.items())
    wanted = (PLAIN[f"{K}.weight"].double() + adapter.delta(K)).float()
    assert torch.allclose(merged[f"{K}.weight"], wanted, rtol=0, atol=1e-6)
    assert merged["lm_head.weight"].dtype == torch.float32
    assert verify(tmp_path / "out", base, path).ok


@pytest.mark.parametrize(
    ("stored", "module"),
    [
        ("layers.0.self_attn.q_proj.qweight", Q),  # without wrappers
        ("model.language_model.layers.0.self_attn.q_proj.trellis", Q),
        ("model.layers.0.self_attn.qkv_proj.qweight", Q),  # fused
        ("model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.qkv_proj"),  # apart
        ("model.layers.0.mlp.experts.3.w1.qweight", "model.layers.0.block_sparse_moe.experts.3.w1"),
    ],
)
def test_under_other_names(stored: str, module: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {stored: torch.zeros(2, N, dtype=torch.int32), **PLAIN}, model_type="llama")
    with pytest.raises(IncompatibleAdapter, match="is quantized with") as refusal:
        merge(base, save_adapter(tmp_path / "adapter", lora({module: (N, N)})), tmp_path / "out")
    assert [problem.partition(":")[0] for problem in refusal.value.problems] == [module]


def test_codes_are_not_extracted(base: Path, tmp_path: Path) -> None:
    dense = save_base(tmp_path / "dense", {f"{Q}.weight": random(N, N), **PLAIN}, model_type="llama")
    for models in ((base, dense), (dense, base)):
        with pytest.raises(IncompatibleAdapter, match="base is quantized with EXL3"):
            extract(*models, tmp_path / "out", 2)
    other = {name: tensor.clone() for name, tensor in (EXL3 | PLAIN).items()}
    other[f"{K}.weight"] = random(N, N, seed=5, dtype=torch.bfloat16)
    tuned = save_base(tmp_path / "tuned", other, model_type="llama", quantization_config=STATED)
    assert [each.path for each in extract(base, tuned, tmp_path / "out", 2).of("factored")] == [K]
    other[f"{Q}.trellis"][0, 0, 0] = 7
    changed = save_base(tmp_path / "changed", other, model_type="llama", quantization_config=STATED)
    with pytest.raises(Exception, match=r"q_proj\.trellis: stored as I16: part of a quantized weight"):
        extract(base, changed, tmp_path / "out2", 2)


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape).to(dtype)


I8, U8, I16, I32, F16, F32, U32 = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.uint32,
)  # fmt: skip
HALF = N // 2

# Name -> config.json's quantization, and what the scheme stores for one module, as its library writes it.
UNREAD: dict[str, tuple[dict[str, object], dict[str, Tensor]]] = {
    "AQLM": ({"quant_method": "aqlm"},
             {"codes": of(I16, N, 2, 1), "codebooks": of(F16, 1, 256, 1, 8), "scales": of(F16, N, 1, 1, 1)}),
    "VPTQ": ({"quant_method": "vptq"}, {"centroids": of(F16, 1, 256), "indices": of(I32, 1, N, 4)}),
    "quanto": ({}, {"weight._data": of(I8, N, N), "weight._scale": of(F16, N, 1), "input_scale": of(F16)}),
    "EETQ": ({"quant_method": "eetq"}, {"weight": of(I8, N, N), "weight_scales": of(F16, N)}),
    "HIGGS": ({"quant_method": "higgs"},
              {"weight": of(I16, HALF, N), "scales": of(F16, 1, N), "tables": of(F16, 16), "tables2": of(F16, 16, 2)}),
    "BitNet": ({"quant_method": "bitnet"}, {"weight": of(U8, 4, N), "weight_scale": of(F16, 1)}),
    "SpQR": ({"quant_method": "spqr", "bits": 3},
             {"dense_weights": of(torch.int64, N), "row_offsets": of(I32, N + 1), "col_vals": of(I32, 3)}),
    "Quark": ({"quant_method": "quark"},
              {"weight": of(U8, N, HALF), "weight_scale": of(F32, N, 1), "weight_zero_point": of(I8, N, 1)}),
    "Quark, FP8": ({"quant_method": "quark"},
                   {"weight": of(torch.float8_e4m3fn, N, N), "weight_scale": of(F32), "input_scale": of(F32)}),
    "FP-Quant": ({"quant_method": "fp_quant"}, {"qweight": of(U8, N, HALF), "scales": of(U8, N, 1)}),
    "FP-Quant, simulated": ({"quant_method": "fp_quant"}, {"dqweight": of(F16, N, N)}),
    "EXL2": ({}, {"q_weight": of(I32, 4, N), "q_invperm": of(I16, N), "q_scale": of(I32, 1, 2),
                  "q_groups": of(I16, 2), "q_scale_max": of(F16, 1)}),
    "EXL3": ({"quant_method": "exl3"},
             {"trellis": of(I16, 1, 1, 64), "suh": of(F16, N), "svh": of(F16, N), "mcg": of(I32)}),
    "SVDQuant": ({}, {"qweight": of(I8, N, HALF), "wscales": of(F16, 1, N), "proj_down": of(F16, N, 4)}),
    "Metal": ({"quant_method": "metal", "bits": 4, "group_size": N},
              {"weight": of(U32, N, 2), "scales": of(F32, N, 1), "qbiases": of(F32, N, 1)}),
    "Four Over Six": ({"quant_method": "fouroversix"},
                      {"quantized_weight_values": of(U8, N, HALF), "quantized_weight_amax": of(F32, 1)}),
    "SINQ": ({"quant_method": "sinq", "nbits": 4},
             {"W_q": of(U8, N, HALF), "scale": of(F16, N, 1), "scale2": of(F16, 1, N), "zero": of(F16, N, 1)}),
    "Gemma's quantization": ({"quant_method": "gemma"}, {"weight": of(U8, N, HALF), "weight_scale": of(F32, N, 1)}),
    "QQQ": ({"quant_method": "qqq"}, {"B": of(I32, 1, 2 * N), "s_channel": of(F32, 1, N), "s_group": of(F16)}),
    "Marlin": ({"quant_method": "marlin"}, {"B": of(I32, 1, 2 * N), "s": of(F16, 1, N)}),
    "ParoQuant": ({"quant_method": "paroquant", "bits": 4},
                  {"qweight": of(I32, N, 2), "qzeros": of(I32, 1, 2), "scales": of(F16, 1, N), "theta": of(F16, 8)}),
    "a_new_one": ({"quant_method": "a_new_one"}, {"packed": of(U8, N, HALF), "steps": of(F32, N)}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", UNREAD)
def test_a_scheme_that_is_not_read_is_refused_by_its_name(scheme: str, tmp_path: Path) -> None:
    """At the first look, by every verb that needs its weights; what it stores plainly is merged."""
    stated, parts = UNREAD[scheme]
    name = scheme.partition(",")[0]
    config = {"quantization_config": stated} if stated else {}
    stored = {f"{Q}.{part}": tensor for part, tensor in parts.items()}
    base = save_base(tmp_path / "base", {**stored, **PLAIN}, model_type="llama", **config)
    dense = save_base(tmp_path / "dense", {f"{Q}.weight": random(N, N), **PLAIN}, model_type="llama")
    on_q = save_adapter(tmp_path / "q", lora({Q: (N, N)}))
    out = tmp_path / "out"
    verbs = {
        "merge": lambda: merge(base, on_q, out),
        "partial": lambda: merge(base, on_q, out, quantized="partial"),
        "verify": lambda: verify(base, base, on_q),
        "compare": lambda: compare(on_q, on_q, base),
        "extract": lambda: extract(base, dense, out, 2),
        "extract from": lambda: extract(dense, base, out, 2),
        "dequantize": lambda: dequantize(base, out),
    }
    for verb, run in verbs.items():
        with pytest.raises(IncompatibleAdapter, match=f"base is quantized with {re.escape(name)}") as refusal:
            run()
        assert all(problem.startswith(f"{Q}: {name}") for problem in refusal.value.problems), verb
        assert not out.exists()
    merge(base, save_adapter(tmp_path / "k", lora({K: (N, N)})), out)
    kept, merged = load(base), load(out)
    assert all(same_bytes(merged[tensor], kept[tensor]) for tensor in stored)


def test_rotated_weights_are_refused_also_where_they_are_plain(tmp_path: Path) -> None:
    """compressed-tensors' transform_config: the model in another basis, whatever its modules are stored as."""
    rotation = {
        "quant_method": "compressed-tensors",
        "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
    }
    rotated = save_base(tmp_path / "rotated", PLAIN, model_type="llama", quantization_config=rotation)
    none = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}
    plain = save_base(tmp_path / "plain", PLAIN, model_type="llama", quantization_config=none)
    on_k = save_adapter(tmp_path / "k", lora({K: (N, N)}))
    for run in (
        lambda: merge(rotated, on_k, tmp_path / "out"), lambda: verify(rotated, rotated, on_k),
        lambda: compare(on_k, on_k, rotated), lambda: extract(rotated, plain, tmp_path / "out", 2),
    ):  # fmt: skip
        with pytest.raises(IncompatibleAdapter, match=r"rotated weights \(config.json: transform_config\)"):
            run()
    assert merge(plain, on_k, tmp_path / "out").changed == 1
