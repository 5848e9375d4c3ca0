"""Groups that grow beyond their scale get another one, on the own grid; all others keep every byte."""

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
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding
from loratools.storage.files import read_tensor
from tests.storage.codecs import test_awq, test_compressed_tensors, test_gptq, test_modelopt, test_mxfp4, test_torchao
from tests.storage.codecs.recode import held, recoded
from tests.surgery.models import lora, random, save_adapter

Q = "model.layers.0.self_attn.q_proj"


def gptq(folder: Path, **stated: Any) -> Path:
    return test_gptq.gptq_base(folder, {Q: test_gptq.gptq_module(4, 32, **stated)[0]}, desc_act=True)


def awq(folder: Path) -> Path:
    return test_awq.awq_base(folder, {Q: test_awq.awq_module()[0]})


def compressed(folder: Path, path: str = Q, form: str = "pack-quantized", **weights: Any) -> Path:
    W = test_compressed_tensors.weight((64, 96))
    parts, _, group = test_compressed_tensors.compress(W, form, **weights)
    return test_compressed_tensors.write(folder, {path: parts}, group, form)


def mlx(folder: Path, **layout: Any) -> Path:
    test_mlx = pytest.importorskip("tests.storage.codecs.test_mlx")
    parts = test_mlx.quantized(test_mlx.numbers(64, 128), **layout)
    mode = {"mode": layout["mode"]} if "mode" in layout else {}
    stated = {"bits": layout.get("bits", 4), "group_size": layout.get("size", 64), **mode}
    base: Path = test_mlx.mlx_base(folder, {Q: parts}, stated)
    return base


def torchao(folder: Path, **layout: Any) -> Path:
    test_torchao.opened(folder, {test_torchao.M: test_torchao.int8(random(64, 96), **layout)})
    return folder


def modelopt(folder: Path, layout: str) -> Path:
    algorithm, make, _ = test_modelopt.LAYOUTS[layout]
    return test_modelopt.write(folder, {test_modelopt.O: make(test_modelopt.weight())}, {"quant_algo": algorithm})


BASES: dict[str, Callable[[Path], Path]] = {
    "GPTQ": lambda folder: gptq(folder, sym=True),
    "GPTQ, zero points, act-order": lambda folder: gptq(folder, act_order=True),
    "AWQ": awq,
    "4-bit integers": lambda folder: compressed(
        folder, num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
    ),
    "4-bit integers, zero points": lambda folder: compressed(
        folder, num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "8-bit integers, blocks": lambda folder: compressed(
        folder, form="int-quantized", num_bits=8, type="int", strategy="block", block_structure=[16, 32]
    ),
    "8-bit integers, one scale": lambda folder: compressed(
        folder, form="int-quantized", num_bits=8, type="int", strategy="tensor", symmetric=True
    ),
    "MXFP4": lambda folder: compressed(
        folder, form="mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8", symmetric=True,
    ),
    "MLX": mlx,
    "MLX, 8 bits": lambda folder: mlx(folder, bits=8, size=32, dtype="float16"),
    "MLX mxfp4": lambda folder: mlx(folder, mode="mxfp4"),
    "MLX mxfp8": lambda folder: mlx(folder, mode="mxfp8"),
    "MLX nvfp4": lambda folder: mlx(folder, mode="nvfp4"),
    "torchao": torchao,
    "torchao, zero points": lambda folder: torchao(folder, lopsided=True),
    "torchao, 7 bits": lambda folder: torchao(folder, reduced=True),
    "modelopt, 4 bits": lambda folder: modelopt(folder, "4 bits, two rows a byte"),
    "modelopt, 8 bits": lambda folder: modelopt(folder, "8 bits"),
}  # fmt: skip


def of(base: Path) -> tuple[Encoding, np.ndarray[Any, Any]]:
    view = logical(Checkpoint.open(base))
    [(name, encoding)] = encodings(view).items()
    return encoding, read_tensor(view.specs[name]).numpy().reshape(-1, encoding.columns)


def groups_of(encoding: Any) -> np.ndarray[Any, Any]:
    """Return the number of each element's group."""
    rows, columns = np.prod(encoding.shape[:-1]), encoding.columns
    height, width = encoding.group
    order = getattr(encoding, "columns_of", None)
    of_column: np.ndarray[Any, Any] = np.arange(columns) // width if order is None else order
    groups: np.ndarray[Any, Any] = (np.arange(rows) // height)[:, None] * (of_column.max() + 1) + of_column
    return groups


@pytest.mark.parametrize("scheme", BASES)
def test_a_group_that_grows_beyond_its_scale_gets_another(tmp_path: Path, scheme: str) -> None:
    encoding, W = of(BASES[scheme](tmp_path / "base"))
    groups = groups_of(encoding)
    grown = groups == groups[9, 40]
    wanted = np.where(grown, W * np.float32(3) + np.float32(0.02), W)
    parts, values = recoded(encoding, wanted, "own")
    values = values.reshape(W.shape)
    assert np.array_equal(values[~grown], W[~grown])
    delta = (wanted - W).astype(np.float64)[grown]
    kept = (values - W).astype(np.float64)[grown] @ delta / (delta @ delta)
    assert abs(kept - 1) < 0.12  # of 4 bits; clipped, less than half was kept
    coarsest = abs(wanted[grown]).max() / 3
    assert abs(values - wanted)[grown].max() < coarsest
    before = held(encoding)
    for part in parts.keys() - {"weight", "qweight", "qdata", "weight_packed"}:
        old = before[part]
        assert np.count_nonzero(parts[part].reshape(-1) != old.reshape(-1).view(parts[part].dtype)) <= 1
    stored = load_file(tmp_path / "base" / "model.safetensors")
    names = encoding.module.names
    for part, array in parts.items():
        tensor = stored[names[part]]
        stored[names[part]] = torch.from_numpy(np.ascontiguousarray(array)).view(tensor.dtype).reshape(tensor.shape)
    with (tmp_path / "base" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    save_file(stored, tmp_path / "base" / "model.safetensors", header.get("__metadata__"))
    assert np.array_equal(of(tmp_path / "base")[1], values)


@pytest.mark.parametrize("scheme", BASES)
def test_what_stays_within_its_scale_keeps_it(tmp_path: Path, scheme: str) -> None:
    """A change of nothing gives every byte again, and one that the levels express leaves the scales."""
    encoding, W = of(BASES[scheme](tmp_path / "base"))
    before = held(encoding)
    for factor, draw in ((1.0, None), (1.0, np.random.default_rng(1).random), (0.5, None), (0.9, None)):
        parts, _ = recoded(encoding, W * np.float32(factor), "own", draw)
        assert len(parts) == 1
        if factor == 1:
            [(part, array)] = parts.items()
            assert array.tobytes() == before[part].tobytes()


@pytest.mark.parametrize("scheme", ["GPTQ, zero points, act-order", "4-bit integers", "MLX", "torchao, zero points"])
def test_at_random_what_grows_is_right_on_average(tmp_path: Path, scheme: str) -> None:
    encoding, W = of(BASES[scheme](tmp_path / "base"))
    wanted = W * np.float32(1.07) + np.float32(1e-4)
    draw = np.random.default_rng(3).random
    mean = np.mean([recoded(encoding, wanted, "own", draw)[1] for _ in range(60)], axis=0, dtype=np.float64)
    delta = (wanted - W).astype(np.float64)
    assert abs(np.vdot(mean.reshape(W.shape) - W, delta) / np.vdot(delta, delta) - 1) < 0.01


def test_blocks_grow_within_the_number_of_the_tensor(tmp_path: Path) -> None:
    """NVFP4: a block gets a scale by the number that the tensor has; the largest has none above it and is clipped."""
    W = test_modelopt.weight() * 0.1
    W[20, 5] = 3.0
    base = test_modelopt.write(tmp_path / "base", {test_modelopt.O: test_modelopt.nvfp4(W)}, {"quant_algo": "NVFP4"})
    encoding, before = of(base)
    wanted = before.copy()
    wanted[4, :16] *= 3
    wanted[20, :16] *= 3
    parts, values = recoded(encoding, wanted, "own")
    assert parts.keys() == {"weight", "weight_scale"}
    assert np.argwhere(parts["weight_scale"] != held(encoding)["weight_scale"]).tolist() == [[4, 0]]
    assert abs(values[4, :16] - wanted[4, :16]).max() < 0.2 * abs(wanted[4, :16]).max()
    assert abs(values[20]).max() == abs(before[20]).max()
    untouched = np.ones(len(W), bool)
    untouched[[4, 20]] = False
    assert np.array_equal(values[untouched], before[untouched])


def test_experts_of_gpt_oss_grow(tmp_path: Path) -> None:
    test_mxfp4.gpt_oss(tmp_path / "base")
    encoding = encodings(logical(Checkpoint.open(tmp_path / "base")))[f"{test_mxfp4.EXPERTS}.gate_up_proj"]
    view = logical(Checkpoint.open(tmp_path / "base"))
    W = read_tensor(view.specs[f"{test_mxfp4.EXPERTS}.gate_up_proj"]).numpy().reshape(-1, encoding.columns)
    wanted = W.copy()
    wanted[32:64, 5] *= 4
    parts, values = recoded(encoding, wanted, "own")
    assert np.array_equal(values.reshape(W.shape), wanted)
    assert np.count_nonzero(parts["scales"] != held(encoding)["scales"]) == 1
    assert recoded(encoding, W, "own")[0].keys() == {"blocks"}


def test_a_merge_that_grows_survives(tmp_path: Path) -> None:
    """Clipped, half of it was lost, and the merge was refused."""
    base = awq(tmp_path / "base")
    save_adapter(tmp_path / "lora", lora({Q: (64, 96)}, rank=8, scale=0.15))
    report = loratools.merge(base, tmp_path / "lora", tmp_path / "out", quantized="requantize")
    assert report.retention is not None
    assert report.retention > 0.95
