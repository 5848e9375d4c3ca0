"""FP8 with scales: W = q·scale by tensor, row and block, against torch's casts in float64; merged by every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.files import chunks, read_tensor

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


def fp8_base(folder: Path, scales: tuple[int, ...], shape: tuple[int, int] = (300, 200)) -> dict[str, torch.Tensor]:
    """Write a base of two FP8 modules and an embedding; return its weights in float64."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(10, 200, generator=generator).bfloat16()
    }
    weights = {}
    for path in (Q, K):
        q = torch.randn(shape, generator=generator).clamp(-3, 3).mul(100).to(torch.float8_e4m3fn)
        scale = torch.rand(scales, generator=generator) * 1e-3
        tensors |= {f"{path}.weight": q, f"{path}.weight_scale_inv": scale}
        wide = scale.double()
        if len(scales) == 2 and scales[1] > 1:
            wide = wide.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
        weights[path] = q.double() * wide
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def lora(folder: Path, path: str, shape: tuple[int, int] = (300, 200), rank: int = 4) -> torch.Tensor:
    """Write a PEFT adapter of one module; return its ΔW in float64."""
    generator = torch.Generator().manual_seed(6)
    A, B = torch.randn(rank, shape[1], generator=generator) / 10, torch.randn(shape[0], rank, generator=generator) / 10
    folder.mkdir()
    start = f"base_model.model.{path}"
    save_file({f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [path.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 2 * (B.double() @ A.double())


@pytest.mark.parametrize("scales", [(3, 2), (), (1,), (300, 1)])
def test_a_weight_reads_as_codes_times_scales(tmp_path: Path, scales: tuple[int, ...]) -> None:
    weights = fp8_base(tmp_path / "base", scales)
    model = logical(Checkpoint.open(tmp_path / "base"))
    assert set(model.specs) == {"model.embed_tokens.weight", f"{Q}.weight", f"{K}.weight"}
    for path, W in weights.items():
        spec = model.specs[f"{path}.weight"]
        torch.testing.assert_close(read_tensor(spec).double(), W, rtol=2**-23, atol=0)
        assert b"".join(bytes(piece) for piece in chunks(spec, 1004)) == read_tensor(spec).numpy().tobytes()


def test_a_merge_in_16_bit_rounds_the_exact_sum_once(tmp_path: Path) -> None:
    weights, delta = fp8_base(tmp_path / "base", (3, 2)), lora(tmp_path / "lora", Q)
    report = loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == {"model.embed_tokens.weight", f"{Q}.weight", f"{K}.weight"}
    exact = (weights[Q] + delta).bfloat16()
    assert (merged[f"{Q}.weight"] != exact).double().mean() <= 1e-3
    torch.testing.assert_close(merged[f"{Q}.weight"].double(), exact.double(), rtol=2**-7, atol=0)
    assert torch.equal(merged[f"{K}.weight"], weights[K].float().bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("FP8 E4M3, blocks of 128 × 128" in note for note in report.notes)


def test_a_partial_merge_leaves_every_other_byte(tmp_path: Path) -> None:
    weights, delta = fp8_base(tmp_path / "base", (3, 2)), lora(tmp_path / "lora", Q)
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="partial")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert (merged[f"{Q}.weight"] != (weights[Q] + delta).bfloat16()).double().mean() <= 1e-3
    assert f"{Q}.weight_scale_inv" not in merged
    for name in (f"{K}.weight", f"{K}.weight_scale_inv", "model.embed_tokens.weight"):
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8))
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated == {**FP8, "modules_to_not_convert": ["lm_head", Q]}


def test_a_merge_into_codes_can_be_refused(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", (3, 2)), lora(tmp_path / "lora", Q)
    with pytest.raises(loratools.errors.IncompatibleAdapter, match=r"1 target tensor.s. of .* are quantized"):
        loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="refuse")
    assert not (tmp_path / "out").exists()
