"""MLX: weights that mx.quantize writes, read as mx.dequantize reads them in float32; merged, and run by mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding
from tests.storage.codecs.recode import K, Q, read, recoded, saved_lora

mx = pytest.importorskip("mlx.core")

SHAPE = (20, 384)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 10


def quantized(W: torch.Tensor, bits: int = 4, size: int = 64, dtype: str = "bfloat16", mode: str = "affine") -> Any:
    """Return what mx.quantize makes of a weight, by part."""
    cast = mx.array(W.numpy()).astype(getattr(mx, dtype))
    made = mx.quantize(cast, size, bits, mode=mode) if mode == "affine" else mx.quantize(cast, mode=mode)
    return dict(zip(("weight", "scales", "biases"), made, strict=False))


def mlx_base(folder: Path, modules: dict[str, Any], stated: dict[str, Any] | None, **plain: Any) -> Path:
    """Write a base of these modules; `stated` is config.json's quantization."""
    folder.mkdir()
    tensors = {f"{path}.{part}": array for path, parts in modules.items() for part, array in parts.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | plain, {"format": "mlx"})
    both = {} if stated is None else {"quantization": stated, "quantization_config": stated}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **both}))
    return folder


def to_torch(array: Any) -> torch.Tensor:
    return torch.tensor(array.astype(mx.float32).tolist())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_affine_reads_as_mlx_does_in_float32(tmp_path: Path, bits: int, size: int, dtype: str) -> None:
    parts = quantized(numbers(*SHAPE), bits, size, dtype)
    W = read(mlx_base(tmp_path / "base", {Q: parts}, {"bits": bits, "group_size": size}))
    wide = (parts["scales"].astype(mx.float32), parts["biases"].astype(mx.float32))
    assert torch.equal(W, to_torch(mx.dequantize(parts["weight"], *wide, size, bits)))
    own = to_torch(mx.dequantize(parts["weight"], parts["scales"], parts["biases"], size, bits))
    digits = {"bfloat16": 8, "float16": 11, "float32": 24}[dtype]  # mlx rounds q·scale, then the sum
    most = W.abs() + 2 * to_torch(mx.abs(parts["biases"])).repeat_interleave(size, 1)
    assert ((W - own).abs() <= most * 2.0 ** (1 - digits)).all()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_read_as_mlx_does(tmp_path: Path, mode: str) -> None:
    parts = quantized(numbers(*SHAPE), mode=mode)
    base = mlx_base(tmp_path / "base", {Q: parts}, {"bits": 4, "group_size": 64, Q: {"mode": mode}})
    assert torch.equal(read(base), to_torch(mx.dequantize(*parts.values(), mode=mode, dtype=mx.float32)))
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    size = 16 if mode == "nvfp4" else 32
    assert (encoding.label, encoding.group) == (f"MLX {mode}, groups of {size}", (1, size))


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_stacks_of_experts(tmp_path: Path, mode: str) -> None:
    parts, path = quantized(numbers(3, *SHAPE), mode=mode), "model.layers.0.mlp.switch_mlp.up_proj"
    W = read(mlx_base(tmp_path / "base", {path: parts}, {"bits": 4, "group_size": 64, "mode": mode}), path)
    if mode == "affine":
        parts = parts | {part: parts[part].astype(mx.float32) for part in ("scales", "biases")}
        assert torch.equal(W, to_torch(mx.dequantize(*parts.values(), 64, 4)))
    else:
        assert torch.equal(W, to_torch(mx.dequantize(*parts.values(), mode=mode, dtype=mx.float32)))


def test_experts_with_a_scale_each(tmp_path: Path) -> None:
    """nvfp4 as mlx-lm quantizes experts, with the largest magnitude of each as `global_scale`."""
    W = mx.array(numbers(3, *SHAPE).numpy())
    largest = mx.max(mx.abs(W), axis=(-2, -1))
    each = [mx.quantize(W[e], mode="nvfp4", global_scale=largest[e]) for e in range(3)]
    weight, scales = (mx.stack(list(part)) for part in zip(*each, strict=True))
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    parts = {"weight": weight, "scales": scales, "global_scale": largest}
    read_back = read(mlx_base(tmp_path / "base", {path: parts}, {"bits": 4, "group_size": 16, "mode": "nvfp4"}), path)
    wanted = [mx.dequantize(*each[e], mode="nvfp4", dtype=mx.float32, global_scale=largest[e]) for e in range(3)]
    assert torch.equal(read_back, to_torch(mx.stack(wanted)))


def test_modules_may_differ(tmp_path: Path) -> None:
    """By an entry of their own; or where only one reading of the tensors is left, which mlx-lm infers too."""
    W = numbers(*SHAPE)
    modules = {Q: quantized(W, 8, 32), K: quantized(W, 4, 64), "lm_head": quantized(W, 3, 32)}
    stated = {"bits": 4, "group_size": 64, "mode": "affine", Q: {"bits": 8, "group_size": 32}}
    model = logical(Checkpoint.open(mlx_base(tmp_path / "base", modules, stated)))
    labels = {name: encoding.label for name, encoding in encodings(model).items()}
    assert labels == {
        f"{Q}.weight": "MLX 8 bit, groups of 32", f"{K}.weight": "MLX 4 bit, groups of 64",
        "lm_head.weight": "MLX 3 bit, groups of 32",
    }  # fmt: skip


def test_what_does_not_agree_is_refused(tmp_path: Path) -> None:
    parts, floats = quantized(numbers(*SHAPE)), quantized(numbers(*SHAPE), mode="mxfp4")
    cases: dict[str, tuple[Any, dict[str, Any] | None]] = {
        "config.json says 3 bits in groups of 64": (parts, {"bits": 4, "group_size": 64, Q: {"bits": 3}}),
        "config.json says nothing of it": (parts, None),
        "config.json says 4 bits in groups of 32": (parts, {"bits": 4, "group_size": 32}),
        "it has no biases like its scales": ({part: parts[part] for part in ("weight", "scales")}, {"bits": 4}),
        "do not fit": (parts | {"scales": parts["scales"][:3]}, {"bits": 4}),
        "config.json says nvfp4, its tensors are mxfp4": (floats, {Q: {"mode": "nvfp4"}}),
        "which do not fit mxfp4, mxfp8 or nvfp4": (floats | {"weight": floats["weight"][:, :20]}, {}),
    }
    for i, (match, (changed, stated)) in enumerate(cases.items()):
        with pytest.raises(UnsupportedAdapter, match=match):
            logical(Checkpoint.open(mlx_base(tmp_path / f"{i}", {Q: changed}, stated)))


def _encoding(folder: Path) -> Encoding:
    [encoding] = encodings(logical(Checkpoint.open(folder))).values()
    return encoding


def _bits(array: Any) -> np.ndarray[Any, Any]:
    """Return an array of mlx as it lies in a file; BF16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_affine_codes_made_again(tmp_path: Path, bits: int, dtype: str) -> None:
    """On the own grid every byte; with fresh scales what mx.quantize makes, to the byte."""
    numbered = numbers(*SHAPE)
    numbered[0, :64], numbered[1, :64], numbered[2, :64] = 0, 0.3, 1e-9
    parts = quantized(numbered, bits, 64, dtype)
    base = mlx_base(tmp_path / "base", {Q: parts}, {"bits": bits, "group_size": 64})
    W = read(base).numpy()
    for draw in (None, np.random.default_rng(0).random):
        made, values = recoded(_encoding(base), W, "own", draw)
        assert set(made) == {"weight"}
        assert np.array_equal(made["weight"], np.array(parts["weight"]))
        assert np.array_equal(values, W)
    other = numbers(*SHAPE, seed=1)
    other[:3] = numbered[:3]
    made, _ = recoded(_encoding(base), other.numpy(), "fresh")
    for part, wanted in quantized(other, bits, 64, dtype).items():
        assert np.array_equal(made[part], _bits(wanted)), part


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_codes_made_again(tmp_path: Path, mode: str) -> None:
    numbered = numbers(3, *SHAPE)
    numbered[0, 0, :64] = 0
    numbered[0, 1, :8] = torch.tensor([6, 0.25, 0.75, -1.25, 1.75, -2.5, 3.5, 5])  # ties
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    parts = quantized(numbered, mode=mode, dtype="float32")
    base = mlx_base(tmp_path / "base", {path: parts}, {"bits": 4, "group_size": 32, "mode": mode})
    W = read(base, path).numpy()
    for draw in (None, np.random.default_rng(0).random):
        made, values = recoded(_encoding(base), W, "own", draw)
        assert np.array_equal(made["weight"], np.array(parts["weight"]))
        assert np.array_equal(values, W)
    other = numbered + numbers(3, *SHAPE, seed=1) * (numbered != 0)
    other[0, 1, :8] = numbered[0, 1, :8] * 2
    made, _ = recoded(_encoding(base), other.numpy(), "fresh")
    for part, wanted in quantized(other, mode=mode, dtype="float32").items():
        assert np.array_equal(made[part], np.array(wanted)), part


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_drawn_codes_are_right_on_average(tmp_path: Path, mode: str) -> None:
    base = mlx_base(tmp_path / "base", {Q: quantized(numbers(*SHAPE), mode=mode)}, {"group_size": 64, "mode": mode})
    W, draw = read(base).numpy() * 0.9, np.random.default_rng(5).random
    inside = np.abs(W) < np.abs(W).max(1, keepdims=True) / 2
    for grid in ("own", "fresh"):
        each = [recoded(_encoding(base), W, grid, draw)[1] for _ in range(100)]
        spread = np.std(each, axis=0)[inside].mean()
        assert spread > 0
        assert abs((np.mean(each, axis=0) - W)[inside].mean()) < 0.02 * spread


def test_merges_by_every_policy(tmp_path: Path) -> None:
    stated = {"group_size": 64, "bits": 4, "mode": "affine"}
    modules = {Q: quantized(numbers(*SHAPE)), K: quantized(numbers(*SHAPE, seed=1))}
    base = mlx_base(tmp_path / "base", modules, stated, **{"model.norm.weight": mx.ones(384, dtype=mx.bfloat16)})
    delta = saved_lora(tmp_path / "lora", Q, SHAPE)
    exact = read(base).double() + delta
    loratools.merge(base, tmp_path / "lora", tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(whole) == {f"{Q}.weight", f"{K}.weight", "model.norm.weight"}
    assert (whole[f"{Q}.weight"] != exact.bfloat16()).double().mean() <= 1e-3
    assert torch.equal(whole[f"{K}.weight"], read(base, K).bfloat16())
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    part, before = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "base"))
    assert torch.equal(part[f"{Q}.weight"], whole[f"{Q}.weight"])
    assert {name for name in part if name.startswith(Q)} == {f"{Q}.weight"}
    assert all(torch.equal(part[name], tensor) for name, tensor in before.items() if not name.startswith(Q))
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {**stated, Q: False}


def test_what_is_left_of_the_model_that_was_converted_says_nothing(tmp_path: Path) -> None:
    """Older conversions of FP8 models keep its quantization_config beside mlx-lm's own field."""
    parts, stated = quantized(numbers(*SHAPE), 8, 32), {"bits": 8, "group_size": 32}
    base = mlx_base(tmp_path / "base", {Q: parts}, stated)
    left = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": left}
    (base / "config.json").write_text(json.dumps(config))
    saved_lora(tmp_path / "lora", Q, SHAPE)
    loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {**stated, Q: False}
