"""NVIDIA modelopt: its formulas, in torch; both places of its config; merges by every policy.

The library does not install without a GPU's; what is made here follows its `NVFP4QTensor`, `pack_int4_in_uint8`,
`get_scaling_factor_from_weight` and `convert_hf_quant_config_format`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.files import chunks, read_tensor
from tests.surgery.models import lora, same_bytes, save_adapter

O, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"  # noqa: E741
N, K = 40, 96

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def weight(seed: int = 3) -> torch.Tensor:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    W[2] = 0
    return W


def nvfp4(W: torch.Tensor) -> Tensors:
    whole = W.abs().max().float() / (6.0 * 448.0)
    blocks = W.float().unflatten(-1, (-1, 16))
    scale = blocks.abs().amax(-1) / (6.0 * whole)
    scale[scale == 0] = 1.0
    scale = scale.clamp(min=2**-9, max=448).to(torch.float8_e4m3fn)
    x = (blocks / (scale.float() * whole).unsqueeze(-1)).flatten(-2)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = torch.searchsorted(bounds, x.abs()).to(torch.uint8)
    codes += (x.abs().unsqueeze(-1) == bounds[[1, 3, 5]]).any(-1).to(torch.uint8) + ((x < 0).to(torch.uint8) << 3)
    packed = codes[:, 1::2] << 4 | codes[:, ::2]
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}


def of_nvfp4(parts: Tensors) -> torch.Tensor:
    codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(-2)
    scale = parts["weight_scale"].float() * parts["weight_scale_2"]
    return (E2M1[codes.long()].unflatten(-1, (-1, 16)) * scale.unsqueeze(-1)).flatten(-2)


def int4(W: torch.Tensor) -> Tensors:
    scale = W.unflatten(-1, (-1, 32)).abs().amax(-1).float() / 7.0
    scale[scale == 0] = 1.0
    q = (W / scale[..., :, torch.arange(K) // 32]).round().clamp(-8, 7).to(torch.int8)
    pairs = q.T.reshape(K, N // 2, 2)
    packed = (pairs[..., 0] & 0x0F | (pairs[..., 1] & 0x0F) << 4).T.contiguous().view(torch.uint8)
    return {"weight": packed, "weight_scale": scale}


def of_int4(parts: Tensors) -> torch.Tensor:
    packed = parts["weight"].to(torch.int8)
    rows = torch.stack([packed << 4 >> 4, packed >> 4], 1).reshape(N, K)
    return rows.float() * parts["weight_scale"].repeat_interleave(32, 1)


def fp8(W: torch.Tensor) -> Tensors:
    scale = W.abs().max().float() / 448.0
    return {"weight": (W / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "input_scale": torch.tensor(0.01)}


def by_row(W: torch.Tensor) -> Tensors:
    scale = torch.where(W.abs().amax(-1) == 0, 448.0, W.abs().amax(-1)) / 448.0
    return {"weight": (W / scale[:, None]).to(torch.float8_e4m3fn), "weight_scale": scale}


def of_scaled(parts: Tensors) -> torch.Tensor:
    scale = parts["weight_scale"].float()
    return parts["weight"].float() * (scale[:, None] if scale.dim() == 1 else scale)


def int8(W: torch.Tensor) -> Tensors:
    scale = W.abs().amax(-1).float() / 127.0
    scale[scale == 0] = 1.0
    return {"weight": (W / scale[:, None]).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def smooth(make: Callable[[torch.Tensor], Tensors]) -> Callable[[torch.Tensor], Tensors]:
    """Return what quantizes W / diag(s), and keeps s beside it."""
    s = torch.rand(K, generator=torch.Generator().manual_seed(9)) + 0.5
    return lambda W: make(W / s) | {"pre_quant_scale": s.clone()}


def of_smooth(read: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], torch.Tensor]:
    return lambda parts: read(parts) * parts["pre_quant_scale"]


Layout = tuple[str, Callable[[torch.Tensor], Tensors], Callable[[Tensors], torch.Tensor]]
LAYOUTS: dict[str, Layout] = {
    "FP8": ("FP8", fp8, of_scaled),
    "FP8 by row": ("FP8_PER_CHANNEL_PER_TOKEN", by_row, of_scaled),
    "NVFP4": ("NVFP4", nvfp4, of_nvfp4),
    "NVFP4, weights alone": ("W4A16_NVFP4", nvfp4, of_nvfp4),
    "NVFP4 with scales of inputs": ("NVFP4_AWQ", smooth(nvfp4), of_smooth(of_nvfp4)),
    "4 bits, two rows a byte": ("W4A16_AWQ", smooth(int4), of_smooth(of_int4)),
    "4 bits for FP8": ("W4A8_AWQ", smooth(lambda W: int4(W) | {"weight_scale_2": torch.tensor(0.5)}),
                       of_smooth(of_int4)),
    "8 bits": ("W8A16", int8, of_scaled),
}  # fmt: skip


def write(folder: Path, parts: dict[str, Tensors], stated: dict[str, Any], old: bool = False) -> Path:
    """Write a base of these modules, with the config of the one or the other place."""
    tensors = {f"{path}.{part}": tensor for path, each in parts.items() for part, tensor in each.items()}
    tensors["lm_head.weight"] = weight(1).bfloat16()
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16"}
    if old:
        inner = {key: value for key, value in stated.items() if key != "ignore"} | {"exclude_modules": stated["ignore"]}
        document = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
        (folder / "hf_quant_config.json").write_text(json.dumps(document))
    else:
        config["quantization_config"] = {"quant_method": "modelopt", **stated}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_reads_by_its_formula(layout: str, old: bool, tmp_path: Path) -> None:
    algorithm, make, read = LAYOUTS[layout]
    parts = make(weight())
    base = write(tmp_path / "base", {O: parts}, {"quant_algo": algorithm, "ignore": ["lm_head"]}, old)
    model = logical(Checkpoint.open(base))
    spec = model.specs[f"{O}.weight"]
    assert model.specs.keys() == {f"{O}.weight", "lm_head.weight"}
    assert torch.equal(read_tensor(spec), read(parts))
    assert b"".join(bytes(piece) for piece in chunks(spec, 1004)) == read_tensor(spec).numpy().tobytes()


def encoded_again(base: Path, grid: Any, W: np.ndarray | None = None) -> Any:
    encoding = encodings(logical(Checkpoint.open(base)))[f"{O}.weight"]
    step = -(-6 // encoding.together) * encoding.together
    with encoding.parts() as parts:
        before = np.empty((N, K), np.float32)
        encoding.decode(parts, 0, before)
        W = before if W is None else W
        encoder = encoding.encoder(parts, grid)
        tiles = [(i, W[i : i + step]) for i in range(0, N, step)]
        for tile in tiles if encoder.needs_pass else ():
            encoder.observe(*tile)
        result = np.concatenate([encoder.encode(*tile) for tile in tiles])
        return encoder.finish(), result, before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_made_again(layout: str, tmp_path: Path) -> None:
    """On the own grid every byte; with fresh scales what modelopt makes."""
    algorithm, make, read = LAYOUTS[layout]
    parts = make(weight())
    base = write(tmp_path / "base", {O: parts}, {"quant_algo": algorithm, "ignore": []})
    changed, result, before = encoded_again(base, "own")
    assert {part: array.tobytes() for part, array in changed.items()} == {
        part: parts[part].reshape(-1).view(torch.uint8).numpy().tobytes() for part in changed
    }
    assert "weight" in changed
    assert np.array_equal(result, before)
    wanted = make(weight(4))
    changed, result, _ = encoded_again(base, "fresh", weight(4).numpy())
    for part, array in changed.items():
        assert array.tobytes() == wanted[part].reshape(-1).view(torch.uint8).numpy().tobytes(), part
    assert changed.keys() >= {"weight", "weight_scale"}
    assert torch.equal(torch.from_numpy(result), read(wanted))


def test_a_number_that_projections_share_stays_as_it_is(tmp_path: Path) -> None:
    """q, k and v have one weight_scale_2: a new one for q alone would be wrong for the fused weight."""
    parts = nvfp4(weight())
    q = "model.layers.0.self_attn.q_proj"
    base = write(tmp_path / "base", {q: parts}, {"quant_algo": "NVFP4", "ignore": []})
    encoding = encodings(logical(Checkpoint.open(base)))[f"{q}.weight"]
    with encoding.parts() as opened:
        encoder = encoding.encoder(opened, "fresh")
        assert not encoder.needs_pass
        result = encoder.encode(0, weight(4).numpy() * np.float32(0.9))
        assert encoder.finish().keys() == {"weight", "weight_scale"}
    assert np.abs(result - weight(4).numpy() * 0.9).max() < 0.6


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layout", ["NVFP4", "4 bits, two rows a byte", "FP8"])
def test_merges_by_every_policy(layout: str, old: bool, tmp_path: Path) -> None:
    algorithm, make, read = LAYOUTS[layout]
    o, down = make(weight()), make(weight(4))
    stated = {"quant_algo": algorithm, "ignore": ["lm_head", "model.embed*"]}
    base = write(tmp_path / "base", {O: o, DOWN: down}, stated, old)
    adapter = lora({O: (N, K)}, scale=0.3)
    path = save_adapter(tmp_path / "lora", adapter)
    for policy in ("dequantize", "partial"):
        loratools.merge(base, path, tmp_path / policy, quantized=policy, keep_residual=True)
        assert loratools.verify(tmp_path / policy, base, path).ok
    loratools.merge(base, path, tmp_path / "codes", quantized="requantize", force=True)
    names = ("base", "dequantize", "partial", "codes")
    before, dense, part, codes = (load_file(tmp_path / name / "model.safetensors") for name in names)
    exact = (read(o).double() + adapter.delta(O)).float().bfloat16()
    assert (dense[f"{O}.weight"] != exact).double().mean() <= 1e-3
    assert torch.equal(dense[f"{DOWN}.weight"], read(down).bfloat16())
    assert dense.keys() == {f"{O}.weight", f"{DOWN}.weight", "lm_head.weight"}
    assert torch.equal(part[f"{O}.weight"], dense[f"{O}.weight"])
    assert part.keys() == before.keys() - {f"{O}.{name}" for name in o} | {f"{O}.weight"}
    assert all(same_bytes(part[name], before[name]) for name in part if name != f"{O}.weight")
    assert codes.keys() == before.keys()
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in names}
    assert "quantization_config" not in configs["dequantize"]
    assert configs["partial"]["quantization_config"]["ignore"] == ["lm_head", "model.embed*", O]
    beside = {name: tmp_path / name / "hf_quant_config.json" for name in names}
    assert {name: file.exists() for name, file in beside.items()} == {
        "base": old, "dequantize": False, "partial": old, "codes": old,
    }  # fmt: skip
    if old:
        inner = {name: json.loads(file.read_text())["quantization"] for name, file in beside.items() if file.exists()}
        assert inner["partial"] == inner["base"] | {"exclude_modules": ["lm_head", "model.embed*", O]}
        assert inner["codes"] == inner["base"]
    loratools.unmerge(tmp_path / "partial", path, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    if old:
        again = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())
        assert again == json.loads(beside["base"].read_text())


def test_layers_of_a_mixed_model(tmp_path: Path) -> None:
    o, down = nvfp4(weight()), fp8(weight(4))
    layers = {O: {"quant_algo": "NVFP4", "group_size": 16}, DOWN: {"quant_algo": "FP8"}}
    stated = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}
    base = write(tmp_path / "base", {O: o, DOWN: down}, stated, old=True)
    model = logical(Checkpoint.open(base))
    assert torch.equal(read_tensor(model.specs[f"{O}.weight"]), of_nvfp4(o))
    assert torch.equal(read_tensor(model.specs[f"{DOWN}.weight"]), of_scaled(down))
    path = save_adapter(tmp_path / "lora", lora({O: (N, K)}))
    loratools.merge(base, path, tmp_path / "out", quantized="partial")
    inner = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (inner["quantized_layers"], inner["exclude_modules"]) == ({DOWN: {"quant_algo": "FP8"}}, [O])


@pytest.mark.parametrize("scale", [torch.rand(3) + 0.5, torch.rand(3, 1, 1) + 0.5, torch.rand(()) + 0.5])
def test_a_stack_of_experts_in_fp8(scale: torch.Tensor, tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    codes = torch.randn(3, N, K, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    tensors = {stack: codes, f"{stack}_weight_scale": scale, "lm_head.weight": weight(1)}
    base = write(tmp_path / "base", {}, {"quant_algo": "FP8", "ignore": []})
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    read = read_tensor(logical(Checkpoint.open(base)).specs[stack])
    assert torch.equal(read, codes.float() * (scale.view(-1, 1, 1) if scale.dim() else scale))


@pytest.mark.parametrize(
    ("parts", "algorithm", "sentence"),
    [
        (fp8(weight()), "NVFP4", r"FP8 \(modelopt\): config.json says NVFP4, and its tensors are FP8"),
        (nvfp4(weight()) | {"svdquant_lora_a": torch.zeros(4, K), "svdquant_lora_b": torch.zeros(N, 4)}, "NVFP4_SVD",
         r"NVFP4 with SVDQuant \(modelopt\): a low-rank part"),
        (nvfp4(weight()) | {"pre_quant_scale": torch.zeros(K)}, "NVFP4_AWQ", "zeros, or no finite numbers"),
        (nvfp4(weight()) | {"pre_quant_scale": torch.ones(K + 1)}, "NVFP4_AWQ", r"\[97\], for 96 columns"),
        (nvfp4(weight()) | {"weight_scale_2": torch.ones(3)}, "NVFP4", r"weight_scale_2 is F32 \[3\]"),
        (nvfp4(weight()) | {"weight_scale": torch.ones(N, 5).to(torch.float8_e4m3fn)}, "NVFP4", "do not fit"),
        (int4(weight()) | {"weight_scale": torch.ones(N, 5)}, "W4A16_AWQ", "do not fit"),
        (int8(weight()) | {"weight_scale": torch.ones(5)}, "W8A16", "do not fit"),
        ({"weight": weight(), "weight_scale": torch.ones(())}, "FP8", "its weight is F32"),
    ],
)  # fmt: skip
def test_refusals(parts: Tensors, algorithm: str, sentence: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", {O: parts}, {"quant_algo": algorithm, "ignore": []})
    with pytest.raises(UnsupportedAdapter, match=rf"o_proj is quantized with .*{sentence}"):
        logical(Checkpoint.open(base))
