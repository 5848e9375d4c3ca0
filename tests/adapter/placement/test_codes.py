"""Adapters on quantized modules: refused by the scheme's name, whatever names the base stores its codes under."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.errors import IncompatibleAdapter
from loratools.surgery.compare import compare
from loratools.surgery.convert import convert
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
