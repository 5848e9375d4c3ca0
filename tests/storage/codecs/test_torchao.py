"""torchao: its tensors, flattened by itself, read as its own dequantize says; written as it quantizes; loaded again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding, Grid
from loratools.storage.files import chunks, read_tensor
from loratools.storage.header import read_header
from tests.storage.codecs.loads import load, logits
from tests.storage.codecs.recode import held, recoded
from tests.surgery.models import lora, random, same_bytes, save_adapter

M, STACK = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"


def ao() -> Any:
    return pytest.importorskip("torchao.quantization")


def int8(W: Tensor, granularity: Any = None, lopsided: bool = False, reduced: bool = False) -> Any:
    quantization = ao()
    kind = quantization.MappingType.ASYMMETRIC if lopsided else quantization.MappingType.SYMMETRIC
    return quantization.Int8Tensor.from_hp(W, granularity or quantization.PerRow(), kind, reduce_range=reduced)


def float8(W: Tensor, granularity: Any = None) -> Any:
    quantization = ao()
    torch_kernels = pytest.importorskip("torchao.quantization.quantize_.common").KernelPreference.TORCH
    return quantization.Float8Tensor.from_hp(
        W, granularity=granularity or quantization.PerRow(), kernel_preference=torch_kernels
    )


def intx(W: Tensor, bits: int, group: int) -> Any:
    dtype = getattr(torch, f"int{bits}")
    return ao().IntxUnpackedToInt8Tensor.from_hp(W, block_size=(*([1] * (W.ndim - 1)), group), target_dtype=dtype)


def int4(W: Tensor, group: int) -> tuple[Any, Tensor]:
    """Return an Int4Tensor, for which torchao wants a library of GPU kernels, and its numbers by torchao's formula."""
    api = pytest.importorskip("torchao.prototype.gptq.api")
    blocks = W.float().unflatten(-1, (-1, group))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / 15).to(W.dtype)
    zero = (low + 8 * scale).to(W.dtype)
    q = ((blocks - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    packed = (q[..., ::2] & 15) | (q[..., 1::2] << 4)
    scale, zero = scale.transpose(-1, -2).contiguous(), zero.transpose(-1, -2).contiguous()
    pieces = zip(*(each.reshape(-1, *each.shape[-2:]) for each in (q, scale.float(), zero.float())), strict=True)
    numbers = torch.stack([api._int4_row_dequantize_zp(*each, group) for each in pieces]).reshape(W.shape)
    return ao().Int4Tensor(packed, scale, zero, [*([1] * (W.ndim - 1)), group], W.shape), numbers


def opened(folder: Path, weights: Mapping[str, Any], edit: Any = None) -> tuple[Checkpoint, Encoding]:
    """Write weights as torchao flattens them, the header's metadata changed by `edit`; return view and first module."""
    flatten = pytest.importorskip("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    tensors, metadata = flatten(dict(weights))
    if edit is not None:
        edit(tensors, metadata)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **metadata})
    stated = {"quant_method": "torchao", "modules_to_not_convert": None}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stated}))
    view = logical(Checkpoint.open(folder))
    return view, next(iter(encodings(view).values()))


def granularity(name: str) -> Any:
    return {"row": ao().PerRow(), "tensor": ao().PerTensor(), "group": ao().PerGroup(16)}[name]


MADE = {
    "int8 by row": int8, "int8 by tensor": lambda W: int8(W, granularity("tensor")),
    "int8 by group": lambda W: int8(W, granularity("group")), "int8 with zeros": lambda W: int8(W, lopsided=True),
    "int8 reduced": lambda W: int8(W, reduced=True), "float8 by row": float8,
    "float8 by tensor": lambda W: float8(W, granularity("tensor")),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(24, 48), (7, 16), (3, 10, 32)])
@pytest.mark.parametrize("case", [*MADE, "int4 by group", "int2 by group"])
def test_a_weight_reads_as_torchao_reads_it(tmp_path: Path, case: str, shape: tuple[int, ...]) -> None:
    W = random(*shape, dtype=torch.bfloat16)
    weight = MADE[case](W) if case in MADE else intx(W, int(case[3]), 8)
    name = M if W.ndim == 2 else STACK
    view, encoding = opened(tmp_path / "base", {name: weight, "model.norm.weight": torch.ones(4)})
    assert view.specs.keys() == {name, "model.norm.weight"}
    assert encoding.name == name
    assert encoding.shape == shape
    ours = read_tensor(view.specs[name])
    assert torch.equal(ours.bfloat16(), weight.dequantize())
    assert b"".join(bytes(piece) for piece in chunks(view.specs[name], 1004)) == ours.numpy().tobytes()
    for draw in (None, np.random.default_rng(1).random):
        parts, values = recoded(encoding, ours.numpy(), "own", draw)
        assert np.array_equal(values, ours.numpy())
        assert len(parts) == 1
        for part, array in parts.items():
            assert array.tobytes() == held(encoding)[part].tobytes()


@pytest.mark.parametrize("shape", [(24, 48), (7, 16)])
@pytest.mark.parametrize("case", MADE)
def test_fresh_scales_are_torchaos(tmp_path: Path, case: str, shape: tuple[int, int]) -> None:
    _, encoding = opened(tmp_path / "base", {M: MADE[case](random(*shape) + 0.1)})
    V = random(*shape, seed=5)
    V[3] = 0
    weight = MADE[case](V)
    _, wanted = opened(tmp_path / "wanted", {M: weight})
    parts, values = recoded(encoding, V.numpy(), "fresh")
    theirs = held(wanted)
    for part in parts.keys() - {"scale", "weight"}:
        assert parts[part].tobytes() == theirs[part].tobytes()
    of_zeros = V.abs().amax(1).numpy() == 0
    if case == "float8 by row":  # torchao makes NaN of a row of zeros: 0 / 0
        assert not np.isnan(values).any()
        parts = {part: array[~of_zeros] for part, array in parts.items()}
        theirs = {part: array[~of_zeros] for part, array in theirs.items()}
    assert all(parts[part].tobytes() == theirs[part].tobytes() for part in parts)
    assert np.array_equal(values[~of_zeros], weight.dequantize().float().numpy()[~of_zeros])


@pytest.mark.parametrize("grid", ["own", "fresh"])
def test_rounding_at_random_is_right_on_average(tmp_path: Path, grid: Grid) -> None:
    _, encoding = opened(tmp_path / "base", {M: int8(random(16, 32), lopsided=True)})
    W = random(16, 32, seed=9).numpy() * 0.5
    generator = np.random.default_rng(3)
    mean = np.mean([recoded(encoding, W, grid, generator.random)[1] for _ in range(300)], axis=0, dtype=np.float64)
    assert abs(mean - W).mean() < 0.2 * abs(recoded(encoding, W, grid)[1] - W).mean()


@pytest.mark.parametrize("shape", [(24, 64), (3, 10, 32)])
def test_int4_reads_as_torchaos_formula_and_is_not_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, numbers = int4(random(*shape, dtype=torch.bfloat16), 16)
    name = M if len(shape) == 2 else STACK
    view, encoding = opened(tmp_path / "base", {name: weight})
    torch.testing.assert_close(read_tensor(view.specs[name]), numbers, rtol=1e-6, atol=1e-6)
    with encoding.parts() as parts, pytest.raises(UnsupportedAdapter, match="does not write it"):
        encoding.encoder(parts, "own")


def changed(**fields: Any) -> Any:
    """Return an edit of what the header says of the weight: its class, or its attributes."""

    def edit(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        told = json.loads(metadata[M])
        told |= {key: value for key, value in fields.items() if key.startswith("_")}
        told["_data"] |= {key: value for key, value in fields.items() if not key.startswith("_")}
        metadata[M] = json.dumps(told)

    return edit


def test_what_is_no_plain_layout_is_refused_by_name(tmp_path: Path) -> None:
    scaled = "its act_pre_scale scales what goes in"
    cases: list[tuple[Any, str]] = [
        (changed(_type="Int4TilePackedTo4dTensor"), "Int4TilePackedTo4dTensor is the layout of a kernel"),
        (changed(_tensor_data_names=["qdata", "scale", "act_pre_scale"]), scaled),
        (lambda tensors, _: tensors.update({M.replace("weight", "_weight_act_pre_scale"): torch.ones(16)}), scaled),
        (lambda _, metadata: metadata.pop(M), "does not say of which class it is"),
        (lambda _, metadata: metadata.update({M: "[" * 9000}), "damaged"),
        (lambda _, metadata: metadata.update({M: '{"_type": 3, "_data": {}}'}), "the header says"),
        (changed(block_size=[1, 1 << 60]), "do not divide its shape"),
        (changed(block_size=[0, 16]), r"block_size \[0, 16\]"),
        (changed(block_size=[1, 8]), "its scale .* does not fit blocks"),
        (changed(block_size="all"), "block_size 'all'"),
        (lambda tensors, _: tensors.pop(M.replace("weight", "_weight_scale")), "scale is missing"),
        (lambda tensors, _: tensors.update({M.replace("weight", "_weight_zero_point"): torch.ones(3)}), "zero_point"),
    ]
    for number, (edit, why) in enumerate(cases):
        with pytest.raises(UnsupportedAdapter, match=f"{M.removesuffix('.weight')} is quantized with torchao: .*{why}"):
            opened(tmp_path / str(number), {M: int8(random(8, 16))}, edit)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int8", "float8", "int4"])
def test_transformers_loads_what_a_merge_leaves(tmp_path: Path, case: str) -> None:
    """The header of the output says which tensors are plain now, and config.json names them."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    quantization = {
        "int8": lambda: ao().Int8WeightOnlyConfig(version=2), "float8": lambda: ao().Float8WeightOnlyConfig(),
        "int4": lambda: ao().IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[case]()  # fmt: skip

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    base = tmp_path / "base"
    load(tmp_path / "plain", quantization_config=transformers.TorchAoConfig(quantization)).save_pretrained(
        base, max_shard_size="100KB"
    )
    assert len(list(base.glob("model-*.safetensors"))) > 1
    shapes = {"model.layers.0.self_attn.o_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}
    adapter = lora(shapes, scale=0.4)
    path = save_adapter(tmp_path / "lora", adapter)
    plain = logits(load(base))
    even = load(base)
    for module in even.modules():
        if type(module) is torch.nn.Linear and type(module.weight.data) is not torch.Tensor:
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    wanted = logits(peft.PeftModel.from_pretrained(even, path))
    effect = torch.linalg.vector_norm(wanted - plain)
    for policy in ("partial", "dequantize"):
        loratools.merge(base, path, tmp_path / policy, quantized=policy)
        assert torch.linalg.vector_norm(logits(load(tmp_path / policy)) - wanted) <= 0.03 * effect
    files = {name: {k: v for f in (tmp_path / name).glob("*.safetensors") for k, v in load_file(f).items()}
             for name in ("base", "partial")}  # fmt: skip
    before, after = files["base"], files["partial"]
    assert after.keys() - before.keys() == {f"{module}.weight" for module in shapes}
    assert before.keys() - after.keys() == {n for n in before if any(n.startswith(f"{m}._") for m in shapes)}
    assert all(same_bytes(after[name], before[name]) for name in before.keys() & after.keys())
    for file in (tmp_path / "partial").glob("*.safetensors"):
        metadata = read_header(file).metadata
        assert {json.loads(metadata[f"{module}.weight"])["_type"] for module in shapes} == {"Tensor"}
        assert json.loads(metadata["model.layers.1.self_attn.q_proj.weight"])["_type"] != "Tensor"
    stated = json.loads((tmp_path / "partial" / "config.json").read_text())["quantization_config"]
    assert set(stated["modules_to_not_convert"]) >= {*shapes, "lm_head"}


@pytest.mark.parametrize("case", ["int8 with zeros", "float8 by row"])
def test_a_merge_makes_codes_again(tmp_path: Path, case: str) -> None:
    """What is measured through the codes is what is in the file; all other bytes stay."""
    opened(tmp_path / "base", {M: MADE[case](random(32, 48)), "model.norm.weight": torch.ones(4)})
    adapter = lora({M.removesuffix(".weight"): (32, 48)}, scale=0.2)
    path = save_adapter(tmp_path / "lora", adapter)
    report = loratools.merge(tmp_path / "base", path, tmp_path / "out", quantized="requantize")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    changed_parts = {name for name in before if not same_bytes(before[name], after[name])}
    assert M.replace("weight", "_weight_qdata") in changed_parts
    assert "model.norm.weight" not in changed_parts
    W, merged = (read_tensor(logical(Checkpoint.open(tmp_path / name)).specs[M]).double() for name in ("base", "out"))
    delta = adapter.delta(M.removesuffix(".weight"))
    kept = ((merged - W) * delta).sum() / (delta * delta).sum()
    assert abs(report.recoded[M] - kept.item()) <= 1e-6
    assert kept > 0.9
