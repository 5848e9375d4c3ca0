"""HQQ: every packing along both axes, against its formula in float64 on codes that are packed here, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.files import chunks, read_tensor
from tests.storage.codecs.recode import opened
from tests.surgery.models import lora, random, same_bytes, save_adapter, save_base

M = "model.layers.0.self_attn.o_proj"
STATED = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}


def packed(q: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Return a matrix of codes as HQQ packs it: its rows in slots, the first slot in the highest bits of a word."""
    per_word, dtype = {8: (1, np.uint8), 4: (2, np.uint8), 3: (10, np.int32), 2: (4, np.uint8), 1: (8, np.uint8)}[bits]
    rows = -(-len(q) // per_word)
    words = np.zeros((rows, q.shape[1]), dtype)
    for (row, column), code in np.ndenumerate(q):
        slot, place = divmod(row, rows)
        words[place, column] |= int(code) << bits * (per_word - 1 - slot)
    return words


def hqq(
    shape: tuple[int, int], bits: float, group: int | None, axis: int, view: torch.dtype | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what HQQ stores for a weight, and the weight in float64."""
    width = {8: 8, 6: 8, 5: 8, 1.58: 2}.get(bits, int(bits))
    generator = np.random.default_rng(seed)
    size = group or shape[axis]
    n = shape[0] * shape[1] // size
    q = generator.integers(0, round(2**bits), (n, size) if axis == 1 else (size, n))
    sides = (n, 1) if axis == 1 else (1, n)
    scale = torch.from_numpy(generator.random(sides) * 0.01 + 0.01).half()
    zero = torch.from_numpy(generator.random(sides) * 2**bits).half()
    codes = torch.from_numpy(packed(q, width))
    name = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[width]

    def text(value: str) -> Tensor:
        return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)

    nbits = torch.tensor(bits, dtype=torch.int32 if bits == int(bits) else torch.float32)
    stored = {
        "W_q": codes if view is None else codes.view(view), "scale": scale, "zero": zero, "nbits": nbits,
        "shape": torch.tensor(shape), "axis": torch.tensor(axis, dtype=torch.int32), "packing": text(name),
        "view_as_float": torch.tensor(int(view is not None), dtype=torch.uint8), "compute_dtype": text("torch.float16"),
        "channel_wise": torch.tensor(1, dtype=torch.uint8), "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        **({} if group is None else {"group_size": torch.tensor(group, dtype=torch.int32)}),
    }  # fmt: skip
    W = ((torch.from_numpy(q).double() - zero.double()) * scale.double()).reshape(shape)
    return {f"{M}.{part}": tensor for part, tensor in stored.items()}, W


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("shape", "bits", "group"),
    [
        ((24, 32), 8, 16), ((24, 32), 6, 16), ((24, 32), 4, 16), ((10, 28), 4, 14), ((24, 32), 3, 16), ((7, 30), 3, 6),
        ((24, 32), 2, 16), ((24, 32), 1.58, 8), ((24, 32), 1, 16), ((16, 8), 4, None), ((5, 9), 3, None),
    ],
)  # fmt: skip
def test_every_packing_reads_as_its_formula(
    tmp_path: Path, shape: tuple[int, int], bits: float, group: int | None, axis: int
) -> None:
    stored, W = hqq(shape, bits, group, axis)
    view, encoding = opened(tmp_path / "base", stored, model_type="llama", quantization_config=STATED)
    assert view.specs.keys() == {f"{M}.weight"}
    assert encoding.shape == shape
    ours = read_tensor(view.specs[f"{M}.weight"])
    torch.testing.assert_close(ours.double(), W, rtol=2**-22, atol=1e-7)
    assert b"".join(bytes(piece) for piece in chunks(view.specs[f"{M}.weight"], 308)) == ours.numpy().tobytes()
    with encoding.parts() as parts, pytest.raises(UnsupportedAdapter, match="does not write it"):
        encoding.encoder(parts, "own")


@pytest.mark.parametrize("view", [torch.float16, torch.float32])
def test_codes_stored_as_the_bytes_of_floats(tmp_path: Path, view: torch.dtype) -> None:
    stored, W = hqq((24, 32), 4, 16, 1, view)
    model, _ = opened(tmp_path / "base", stored)
    torch.testing.assert_close(read_tensor(model.specs[f"{M}.weight"]).double(), W, rtol=2**-22, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_library_stores_what_is_read(tmp_path: Path, bits: int, axis: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    layer = torch.nn.Linear(64, 48, bias=False)
    settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis)
    made = quantize.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
    stored = {f"{M}.{part}": tensor.contiguous() for part, tensor in made.state_dict().items() if tensor is not None}
    view, _ = opened(tmp_path / "base", stored)
    assert torch.equal(read_tensor(view.specs[f"{M}.weight"]), made.dequantize())


def test_merges_by_every_policy(tmp_path: Path) -> None:
    stored, W = hqq((24, 32), 4, 16, 1)
    other, V = hqq((24, 32), 3, 16, 0, seed=3)
    other = {name.replace("layers.0", "layers.1"): tensor for name, tensor in other.items()}
    plain = {"lm_head.weight": random(9, 32, dtype=torch.float16)}
    base = save_base(
        tmp_path / "base", stored | other | plain, model_type="llama", dtype="float16", quantization_config=STATED
    )
    adapter = lora({M: (24, 32)})
    path = save_adapter(tmp_path / "lora", adapter)
    wanted = (W + adapter.delta(M)).half()
    for policy in ("dequantize", "partial"):
        loratools.merge(base, path, tmp_path / policy, quantized=policy)
        merged = load_file(tmp_path / policy / "model.safetensors")
        assert (merged[f"{M}.weight"] != wanted).double().mean() <= 1e-3
        torch.testing.assert_close(merged[f"{M}.weight"].double(), wanted.double(), rtol=2**-10, atol=1e-7)
        rest = {name: tensor for name, tensor in merged.items() if name != f"{M}.weight"}
        if policy == "partial":
            assert rest.keys() == (other | plain).keys()
            assert all(same_bytes(tensor, (other | plain)[name]) for name, tensor in rest.items())
        else:
            assert rest.keys() == {"model.layers.1.self_attn.o_proj.weight", "lm_head.weight"}
            assert torch.equal(rest["model.layers.1.self_attn.o_proj.weight"], V.float().half())
    listed = json.loads((tmp_path / "partial" / "config.json").read_text())["quantization_config"]
    assert listed == STATED | {"skip_modules": ["lm_head", M]}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def number(value: float, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({"shape": torch.tensor([1 << 40, 1 << 40])}, "W_q has"),
        ({"shape": torch.tensor([24, -32])}, "shape says"),
        ({"shape": torch.tensor([24, 32, 1])}, "shape says"),
        ({"shape": torch.zeros(100, dtype=torch.int64)}, "a few numbers"),
        ({"shape": None}, "shape is missing"),
        ({"axis": number(2)}, "axis says 2"),
        ({"nbits": number(9)}, "9 bits in the packing '4bit_u8'"),
        ({"nbits": number(float("nan"), torch.float32)}, "one number was expected"),
        ({"packing": torch.tensor([200, 1], dtype=torch.uint8)}, r"packing '\?\?'"),
        ({"group_size": number(0)}, "group_size 0"),
        ({"group_size": number(7)}, "does not divide"),
        ({"scale": torch.ones(5)}, "it has 48 groups"),
        ({"quant_scale": number(1, torch.uint8)}, "quantized themselves"),
        ({"W_q": torch.zeros(24, 15, dtype=torch.uint8)}, "W_q has 360 bytes"),
    ]
    good, _ = hqq((24, 32), 4, 16, 1)
    for index, (change, why) in enumerate(cases):
        edited: dict[str, Any] = good | {f"{M}.{part}": tensor for part, tensor in change.items()}
        base = save_base(tmp_path / str(index), {name: each for name, each in edited.items() if each is not None})
        with pytest.raises(UnsupportedAdapter, match=f"{M} is quantized with HQQ: .*{why}"):
            logical(Checkpoint.open(base))
