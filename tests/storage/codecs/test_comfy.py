"""ComfyUI's scaled FP8, old and new, and plain casts: read, merged by every policy, and as ComfyUI reads that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools.decisions import warnings_to
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.files import read_tensor
from tests.storage.codecs import comfy_models
from tests.storage.codecs.comfy_models import PREFIX, Weights
from tests.surgery.models import same_bytes

HOW = ["old", "tensors", "header"]
CASTS = [torch.float8_e4m3fn, torch.float8_e5m2]


def as_comfy_reads(path: Path) -> Weights:
    """Return a file's numbers as ComfyUI reads them: `convert_old_quants`, then layer by layer, in float64."""
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    layers: dict[str, Any] = {}
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
    elif stored.pop(f"{PREFIX}scaled_fp8", None) is not None:
        for name in [name for name in stored if name.endswith(".scale_weight")]:
            layer = name.removesuffix(".scale_weight")
            layers[layer], stored[f"{layer}.weight_scale"] = {"format": "float8_e4m3fn"}, stored.pop(name)
            stored.pop(f"{layer}.scale_input", None)
    for name in [name for name in stored if name.endswith(".comfy_quant")]:
        layers[name.removesuffix(".comfy_quant")] = json.loads(bytes(stored.pop(name).numpy()))
    for layer in layers:
        assert layers[layer]["format"].startswith("float8")
        scale = stored.pop(f"{layer}.weight_scale").double()
        stored.pop(f"{layer}.input_scale", None)
        stored[f"{layer}.weight"] = stored[f"{layer}.weight"].double() * scale
    assert not [name for name in stored if name.endswith(("_scale", "_quant", "scale_weight", "scale_input"))]
    return {name: W.double() for name, W in stored.items()}


def base(path: Path, how: str | torch.dtype) -> tuple[Weights, Weights]:
    return comfy_models.scaled(path, how) if isinstance(how, str) else comfy_models.cast(path, how)


@pytest.mark.parametrize("how", [*HOW, *CASTS])
def test_every_weight_reads_as_what_it_stands_for(tmp_path: Path, how: str | torch.dtype) -> None:
    stored, numbers = base(tmp_path / "base.safetensors", how)
    model = logical(Checkpoint.open(tmp_path / "base.safetensors"))
    assert model.specs.keys() == numbers.keys()
    for name, W in numbers.items():
        torch.testing.assert_close(read_tensor(model.specs[name]).double(), W, rtol=2**-23, atol=0)
    assert as_comfy_reads(tmp_path / "base.safetensors").keys() == numbers.keys()
    assert model.stored is not None
    assert model.stored.specs.keys() == stored.keys()


@pytest.mark.parametrize("how", [*HOW, *CASTS])
@pytest.mark.parametrize("policy", ["dequantize", "partial"])
def test_a_kohya_lora_is_merged_into_the_file(tmp_path: Path, how: str | torch.dtype, policy: Any) -> None:
    """One file of the same name, which ComfyUI reads as base + ΔW; what it would cast again is said."""
    stored, numbers = base(tmp_path / "base.safetensors", how)
    deltas = comfy_models.lora(tmp_path / "lora.safetensors")
    said: list[str] = []
    with warnings_to(said.append):
        loratools.merge(
            tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", quantized=policy
        )
    merged = load_file(tmp_path / "out" / "base.safetensors")
    read = as_comfy_reads(tmp_path / "out" / "base.safetensors")
    assert read.keys() == numbers.keys()
    for name, W in numbers.items():
        plain = policy == "dequantize" or name in deltas
        wanted = (W + deltas.get(name, 0)).bfloat16().double() if plain else W
        assert (read[name] != wanted).double().mean() <= 1e-3, name
        torch.testing.assert_close(read[name], wanted, rtol=2**-7, atol=0)
        assert merged[name].dtype == (torch.bfloat16 if plain else stored[name].dtype)
    if policy == "partial":
        layers = [name.removesuffix(".weight") for name in deltas]
        kept = {name for name in stored if not any(name.startswith(f"{layer}.") for layer in layers)}
        assert kept <= merged.keys()
        assert all(same_bytes(merged[name], stored[name]) for name in kept)
    assert any("FP8" in text for text in said) == (policy == "partial" and how not in ("tensors", "header"))
    assert loratools.verify(
        tmp_path / "out" / "base.safetensors", tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    ).ok


@pytest.mark.parametrize("how", [*HOW, *CASTS])
def test_the_names_of_diffusers_reach_a_third_of_a_fused_weight(tmp_path: Path, how: str | torch.dtype) -> None:
    """Codes made again: within half a step of base + ΔW in k, and every code of q and v is the base's."""
    stored, numbers = base(tmp_path / "base.safetensors", how)
    A, B = torch.randn(2, 32, generator=torch.Generator().manual_seed(6)) / 9, torch.ones(32, 2) / 200
    module = "transformer.transformer_blocks.0.attn.to_k"
    save_file({f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}, tmp_path / "lora.safetensors")
    loratools.merge(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", quantized="requantize",
        force=True,
    )  # fmt: skip
    merged, read = (
        load_file(tmp_path / "out" / "base.safetensors"),
        as_comfy_reads(tmp_path / "out" / "base.safetensors"),
    )
    name = f"{PREFIX}double_blocks.0.img_attn.qkv.weight"
    assert {other for other in stored if not same_bytes(merged[other], stored[other])} == {name}
    changed = (merged[name].view(torch.uint8) != stored[name].view(torch.uint8)).reshape(3, 32, 32).any(-1).any(-1)
    assert changed.tolist() == [False, True, False]
    wanted = numbers[name].reshape(3, 32, 32).clone()
    wanted[1] += B.double() @ A.double()
    step = wanted.abs() * torch.finfo(stored[name].dtype).eps
    scale = (numbers[name].abs().max() / stored[name].double().abs().max()).item()
    least = torch.finfo(stored[name].dtype).smallest_normal * torch.finfo(stored[name].dtype).eps * scale
    assert ((read[name].reshape(3, 32, 32) - wanted).abs() <= step.clamp(min=least) * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("how", [*HOW, *CASTS])
def test_a_lora_of_next_to_nothing_leaves_every_byte(tmp_path: Path, how: str | torch.dtype) -> None:
    base(tmp_path / "base.safetensors", how)
    comfy_models.lora(tmp_path / "lora.safetensors")
    factors = load_file(tmp_path / "lora.safetensors")
    factors = {name: tensor * 1e-30 if "down" in name else tensor for name, tensor in factors.items()}
    save_file(factors, tmp_path / "lora.safetensors")
    loratools.merge(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", quantized="requantize",
        force=True,
    )  # fmt: skip
    assert (tmp_path / "out" / "base.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


@pytest.mark.parametrize("scales", [(), (1,), (48, 1), (48, 4, 1)])
def test_old_scales_of_other_shapes(tmp_path: Path, scales: tuple[int, ...]) -> None:
    """musubi-tuner writes one for each row, or for each part of a row."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(48, 64, generator=generator).mul(90).to(torch.float8_e4m3fn)
    scale = torch.rand(scales, generator=generator)
    save_file({"a.weight": q, "a.scale_weight": scale}, tmp_path / "base.safetensors")
    W = read_tensor(logical(Checkpoint.open(tmp_path / "base.safetensors")).specs["a.weight"])
    by_part = scale.reshape(1, 1, 1) if scale.numel() == 1 else scale.reshape(48, -1, 1)
    assert torch.equal(W, (q.float().reshape(48, by_part.shape[1], -1) * by_part).reshape(48, 64))


def one_layer(path: Path, said: bytes | torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Path:
    text = torch.tensor(list(said), dtype=torch.uint8) if isinstance(said, bytes) else said
    q = torch.ones(32, 32).to(dtype)
    save_file({"a.weight": q, "a.weight_scale": torch.tensor(2.0), "a.comfy_quant": text}, path)
    return path


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b'{"format": "int8_tensorwise", "convrot": true}', r"its weight is rotated \(convrot\)"),
        (b'{"format": "int8_tensorwise", "params": {"convrot": true}}', r"its weight is rotated \(convrot\)"),
        (b'{"format": "int8_tensorwise"}', r"its format is int8_tensorwise, and its weight F8_E4M3 \[32, 32\]"),
        (b'{"format": "convrot_w4a4"}', "its format is convrot_w4a4, and float8_e4m3fn, float8_e5m2, int8_tensorwise"),
        (b'{"format": "float8_e5m2"}', r"its format is F8_E5M2, and its weight F8_E4M3 \[32, 32\]"),
        (b'{"format": "mxfp8"}', r"its weight_scale is F32 \[\], and F8_E8M0 \[128, 4\] was expected"),
        (b'{"format": "nvfp4"}', "weight_scale_2 is missing"),
        (b"{}", "its format is None"),
        (b"[1]", r"comfy_quant says \[1\] of it, and an object was expected"),
        (b"{", "comfy_quant is no JSON"),
        (b"[" * 60_000, "comfy_quant is no JSON"),
        (b"\xff", "comfy_quant is no JSON"),
        (torch.zeros(100_000, dtype=torch.uint8), r"comfy_quant is U8 \[100000\]"),
        (torch.zeros(4), r"comfy_quant is F32 \[4\]"),
    ],
)
def test_other_layers_are_refused_by_name(tmp_path: Path, said: bytes | torch.Tensor, message: str) -> None:
    path = one_layer(tmp_path / "base.safetensors", said)
    with pytest.raises(UnsupportedAdapter, match="a is quantized with ComfyUI: " + message):
        logical(Checkpoint.open(path))


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ("[]", BadFile, "not the JSON object"),
        ('{"layers": ', BadFile, "JSON"),
        ('{"layers": {"a": 3}}', UnsupportedAdapter, "_quantization_metadata says 3 of it, and an object was expected"),
        ('{"layers": {"a": {"format": []}}}', UnsupportedAdapter, r"its format is \[\]"),
    ],
)
def test_headers_that_say_something_else(tmp_path: Path, metadata: str, error: Any, message: str) -> None:
    path = tmp_path / "base.safetensors"
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(2.0)}
    save_file(tensors, path, {"_quantization_metadata": metadata})
    with pytest.raises(error, match=message):
        logical(Checkpoint.open(path))


def test_a_cast_model_has_no_scales_that_are_stated(tmp_path: Path) -> None:
    """Where config.json says that there are scales, one that is missing is no cast."""
    save_file({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedAdapter, match=r"a is quantized with FP8 without scales: config\.json states fp8"):
        logical(Checkpoint.open(tmp_path))


def test_a_cast_model_in_all_its_shapes(tmp_path: Path) -> None:
    """Convolutions, biases, embeddings without `.weight`, parameters beside a weight."""
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "pos_embed": (1, 5, 6), "norm.weight": (6,),
              "attn.weight": (6, 6), "attn.other": (6, 2)}  # fmt: skip
    stored = {name: torch.randn(shape).to(torch.float8_e5m2) for name, shape in shapes.items()}
    save_file({**stored, "ids": torch.arange(3)}, tmp_path / "base.safetensors")
    loratools.dequantize(tmp_path / "base.safetensors", tmp_path / "out")
    written = load_file(tmp_path / "out" / "base.safetensors")
    assert written.keys() == {*stored, "ids"}
    assert all(torch.equal(written[name], q.bfloat16()) for name, q in stored.items())


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in the order of cuBLAS' tiles of 128 rows and 4 blocks, padded with zeros."""
    rows, blocks = scales.shape
    high, wide = -(-rows // 128), -(-blocks // 4)
    padded = torch.zeros(high * 128, wide * 4, dtype=torch.uint8)
    padded[:rows, :blocks] = scales
    made = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for row in range(rows):
        for block in range(blocks):
            tile = row // 128 * wide + block // 4
            made[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = padded[row, block]
    return made.reshape(high * 128, wide * 4)


@pytest.mark.parametrize("shape", [(32, 64), (160, 32), (130, 320)])
@pytest.mark.parametrize("form", ["mxfp8", "nvfp4", "int8_tensorwise", "int8_tensorwise, by row"])
def test_other_formats_are_read(tmp_path: Path, form: str, shape: tuple[int, int]) -> None:
    """By their formulas, and as comfy-kitchen reads them where it is installed."""
    generator = torch.Generator().manual_seed(4)
    rows, columns = shape
    stored: Weights = {}
    if form.startswith("int8"):
        q = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        stored = {"a.weight": q, "a.weight_scale": torch.rand((rows, 1) if "row" in form else (), generator=generator)}
        wanted = q.float() * stored["a.weight_scale"]
    elif form == "mxfp8":
        q = torch.randn(shape, generator=generator).mul(99).to(torch.float8_e4m3fn)
        powers = torch.randint(100, 140, (rows, columns // 32), generator=generator).to(torch.uint8)
        stored = {"a.weight": q, "a.weight_scale": tiled(powers).view(torch.float8_e8m0fnu)}
        wanted = q.float() * torch.exp2(powers.float() - 127).repeat_interleave(32, 1)
    else:
        codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
        scales = torch.rand((rows, columns // 16), generator=generator).mul(300).to(torch.float8_e4m3fn)
        number = torch.tensor(0.003)
        stored = {"a.weight": codes[:, ::2] << 4 | codes[:, 1::2], "a.weight_scale_2": number,
                  "a.weight_scale": tiled(scales.view(torch.uint8)).view(torch.float8_e4m3fn)}  # fmt: skip
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        numbers = torch.cat([levels, -levels])[codes.int()]
        wanted = numbers * (scales.float() * number).repeat_interleave(16, 1)
    said = json.dumps({"format": form.partition(",")[0]}).encode()
    stored["a.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(stored, tmp_path / "base.safetensors")
    view = logical(Checkpoint.open(tmp_path / "base.safetensors"))
    assert torch.equal(read_tensor(view.specs["a.weight"]), wanted)
    loratools.dequantize(tmp_path / "base.safetensors", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "base.safetensors")["a.weight"], wanted.bfloat16())
    kitchen = pytest.importorskip("comfy_kitchen")
    if form == "mxfp8":
        theirs = kitchen.dequantize_mxfp8(stored["a.weight"], stored["a.weight_scale"], torch.float32)
        assert torch.equal(theirs, wanted)
    elif form == "nvfp4":
        theirs = kitchen.dequantize_nvfp4(
            stored["a.weight"], stored["a.weight_scale_2"], stored["a.weight_scale"], torch.float32
        )
        assert torch.equal(theirs, wanted)
