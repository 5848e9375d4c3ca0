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
from loratools.storage.codecs import fp8
from loratools.storage.files import chunks, read_tensor
from tests.storage.codecs.recode import K, Q, saved_lora

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
    weights, delta = fp8_base(tmp_path / "base", (3, 2)), saved_lora(tmp_path / "lora", Q, (300, 200))
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
    weights, delta = fp8_base(tmp_path / "base", (3, 2)), saved_lora(tmp_path / "lora", Q, (300, 200))
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="partial")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert (merged[f"{Q}.weight"] != (weights[Q] + delta).bfloat16()).double().mean() <= 1e-3
    assert f"{Q}.weight_scale_inv" not in merged
    for name in (f"{K}.weight", f"{K}.weight_scale_inv", "model.embed_tokens.weight"):
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8))
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated == {**FP8, "modules_to_not_convert": ["lm_head", Q]}


def test_a_merge_into_codes_can_be_refused(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", (3, 2)), saved_lora(tmp_path / "lora", Q, (300, 200))
    with pytest.raises(loratools.errors.IncompatibleAdapter, match=r"1 target tensor of .* is quantized"):
        loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="refuse")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stated", "lists"),
    [
        ({"quant_method": "fp8"}, {"modules_to_not_convert": [Q]}),
        ({"quant_method": "fp8", "modules_to_not_convert": None}, {"modules_to_not_convert": [Q]}),
        ({"quant_method": "fp8", "ignored_layers": ["lm_head"]}, {"ignored_layers": ["lm_head", Q]}),
        (
            {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["a"], "ignored_layers": ["b"]},
            {"modules_to_not_convert": ["a", Q], "ignored_layers": ["b", Q]},
        ),
    ],
)
def test_the_list_of_plain_modules_is_the_one_that_is_read(stated: dict[str, Any], lists: dict[str, Any]) -> None:
    assert fp8.plain(stated, [Q]) == {**stated, **lists}


def test_the_lists_of_other_methods_are_not_guessed() -> None:
    with pytest.raises(loratools.errors.UnsupportedAdapter, match=r"config\.json states of_tomorrow"):
        fp8.plain({"quant_method": "of_tomorrow"}, [Q])


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "weight_scale"])
def test_scales_under_other_names(tmp_path: Path, name: str) -> None:
    """DeepSeek-V4's and Mistral's; and fbgemm's, whose stacks of experts have one scale a column."""
    q, E = torch.arange(40 * 64).remainder(120).to(torch.uint8).reshape(40, 64).view(torch.float8_e4m3fn), "l.experts"
    powers = torch.tensor([[120, 127]], dtype=torch.uint8)
    tensors = {"a.weight": q, f"a.{name}": powers.view(torch.float8_e8m0fnu) if name == "scale" else torch.tensor(0.5)}
    stack, columns = torch.stack([q, q]), torch.rand(2, 1, 64)
    turned, rows = torch.stack([q, q])[:, :, :40], torch.rand(2, 40, 1)
    of_experts = {f"{E}.gate_up_proj": stack, f"{E}.gate_up_proj_scale": columns,
                  f"{E}.down_proj": turned.contiguous(), f"{E}.down_proj_scale": rows}  # fmt: skip
    stated = (
        {"quant_method": "fbgemm_fp8"}
        if name == "weight_scale"
        else {"quant_method": "fp8", "weight_block_size": [40, 32]}
    )
    if name == "weight_scale":
        tensors |= {**of_experts, "a.weight_scale": torch.rand(40, 1)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": stated}))
    specs = logical(Checkpoint.open(tmp_path / "base")).specs
    scale = {"scale": torch.tensor([2.0**-7, 1.0]).repeat_interleave(32), "qscale_weight": torch.tensor(0.5),
             "weight_scale": tensors.get("a.weight_scale")}[name]  # fmt: skip
    assert torch.equal(read_tensor(specs["a.weight"]), q.float() * scale)
    if name == "weight_scale":
        assert torch.equal(read_tensor(specs[f"{E}.gate_up_proj"]), stack.float() * columns)
        assert torch.equal(read_tensor(specs[f"{E}.down_proj"]), turned.float() * rows.transpose(1, 2))


def test_scales_of_the_cache_stay_beside_a_plain_weight(tmp_path: Path) -> None:
    """In a partial merge; where all is written in 16 bit they go, with the statement that they are used."""
    fp8_base(tmp_path / "base", (3, 2)), saved_lora(tmp_path / "lora", Q, (300, 200))
    path = tmp_path / "base" / "model.safetensors"
    more = {f"{Q}.k_scale": torch.tensor(0.1), f"{Q}.activation_scale": torch.tensor(0.2),
            "model.layers.0.self_attn.v_scale": torch.tensor(0.3)}  # fmt: skip
    save_file({**load_file(path), **more}, path)
    kept = {}
    for policy in ("partial", "dequantize"):
        loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / policy, quantized=policy)  # type: ignore[arg-type]
        kept[policy] = load_file(tmp_path / policy / "model.safetensors").keys() & more.keys()
    assert kept == {"partial": {f"{Q}.k_scale", "model.layers.0.self_attn.v_scale"}, "dequantize": set()}
