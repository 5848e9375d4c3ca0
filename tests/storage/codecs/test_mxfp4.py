"""MXFP4 of gpt-oss: against transformers' own reading; merges into stacks of experts; loaded by transformers."""

from __future__ import annotations

import json
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

EXPERTS = "model.layers.0.mlp.experts"
E, H, I = 3, 96, 64  # noqa: E741

Tensors = dict[str, torch.Tensor]


def stack(out: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and scales of random codes, -0 among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (E, out, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(121, 125, blocks.shape[:-1], generator=generator, dtype=torch.uint8)


def read_by_transformers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return weight


def gpt_oss(folder: Path) -> Tensors:
    """Write a gpt-oss of one layer as the released ones are stored; return its tensors."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=50, hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_local_experts=E, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(3)
    tensors = dict(transformers.GptOssForCausalLM(config).bfloat16().state_dict())
    for name, sides, seed in (("gate_up_proj", (2 * I, H), 1), ("down_proj", (H, I), 2)):
        del tensors[f"{EXPERTS}.{name}"]
        tensors[f"{EXPERTS}.{name}_blocks"], tensors[f"{EXPERTS}.{name}_scales"] = stack(*sides, seed)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": stated}))
    return tensors


def test_a_stack_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    tensors = gpt_oss(tmp_path / "base")
    model = logical(Checkpoint.open(tmp_path / "base"))
    for name in ("gate_up_proj", "down_proj"):
        spec = model.specs[f"{EXPERTS}.{name}"]
        parts = (tensors[f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales"))
        wanted = read_by_transformers(*parts)
        assert spec.shape == tuple(wanted.shape)
        assert torch.equal(read_tensor(spec), wanted)
        assert b"".join(bytes(piece) for piece in chunks(spec, 1004)) == wanted.numpy().tobytes()
    assert f"{EXPERTS}.gate_up_proj_bias" in model.specs


def encoded_again(base: Path, grid: Any, change: Any = None, draw: Any = None) -> Any:
    encoding = encodings(logical(Checkpoint.open(base)))[f"{EXPERTS}.gate_up_proj"]
    with encoding.parts() as parts:
        before = np.empty((E * H, 2 * I), np.float32)
        encoding.decode(parts, 0, before)
        W = before if change is None else change(before)
        encoder = encoding.encoder(parts, grid, draw)
        step = 2 * encoding.together
        result = np.concatenate([encoder.encode(i, W[i : i + step]) for i in range(0, len(W), step)])
        return encoder.finish(), result, before


def test_the_own_grid_gives_every_byte_again(tmp_path: Path) -> None:
    tensors = gpt_oss(tmp_path / "base")
    changed, result, before = encoded_again(tmp_path / "base", "own")
    assert changed["blocks"].tobytes() == tensors[f"{EXPERTS}.gate_up_proj_blocks"].numpy().tobytes()
    assert changed.keys() == {"blocks"}
    assert np.array_equal(result, before)
    fresh, result, _ = encoded_again(tmp_path / "base", "fresh")
    assert np.array_equal(result, before)  # other bytes may stand for the same numbers
    assert {part: array.shape for part, array in fresh.items()} == {
        part: tuple(tensors[f"{EXPERTS}.gate_up_proj_{part}"].shape) for part in ("blocks", "scales")
    }


def test_fresh_scales_err_less_than_the_rule_and_the_next_power(tmp_path: Path) -> None:
    gpt_oss(tmp_path / "base")
    W = np.random.default_rng(4).standard_normal((E * H, 2 * I)).astype(np.float32)
    W[:32, 0] = 0
    changed, result, _ = encoded_again(tmp_path / "base", "fresh", lambda _: W)
    wanted = read_by_transformers(*(torch.from_numpy(changed[part]) for part in ("blocks", "scales")))
    assert torch.equal(torch.from_numpy(result).view(E, H, 2 * I), wanted)
    blocks = W.reshape(E, H // 32, 32, 2 * I).swapaxes(2, 3).astype(np.float64)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([-values, values])
    errors = []
    for more in (0, 1):
        with np.errstate(divide="ignore"):
            power = np.floor(np.log2(np.abs(blocks).max(axis=-1, keepdims=True))) - 2 + more
        scale = 2.0 ** np.maximum(power, -127)
        nearest = np.abs(blocks[..., None] / scale[..., None] - values).min(axis=-1) * scale
        errors.append((nearest**2).sum(axis=-1))
    ours = ((result - W).reshape(E, H // 32, 32, 2 * I).swapaxes(2, 3).astype(np.float64) ** 2).sum(axis=-1)
    assert np.allclose(ours, np.minimum(*errors), rtol=1e-5)
    assert (errors[1] < errors[0]).any()
    assert (errors[0] < errors[1]).any()


def test_rounding_at_random_is_right_on_average(tmp_path: Path) -> None:
    gpt_oss(tmp_path / "base")
    random = np.random.default_rng(5)

    def draw(shape: tuple[int, ...]) -> Any:
        return random.random(shape, np.float32)

    total, W = np.zeros((E * H, 2 * I)), np.zeros(())
    for _ in range(200):
        _, result, before = encoded_again(tmp_path / "base", "own", lambda before: before * np.float32(0.9), draw)
        W = before * np.float32(0.9)
        total += result
    assert np.abs(total / 200 - W).max() <= np.abs(before).max() / 3 * 0.5 * 5 / 200**0.5
    assert abs((total / 200 - W).mean() / np.abs(W).mean()) < 1e-3


def lora(folder: Path) -> torch.Tensor:
    """Write what PEFT saves of a LoRA on the stack `gate_up_proj`; return its ΔW in float64, [E, H, 2I]."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = json.loads((folder.parent / "base" / "config.json").read_text())
    config = transformers.GptOssConfig(**{key: config[key] for key in config if key != "quantization_config"})
    model = peft.get_peft_model(
        transformers.GptOssForCausalLM(config),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)) / 8)
        layer = next(module for module in model.modules() if hasattr(module, "parameter_name"))
        delta: torch.Tensor = layer.get_delta_weight("default").double()
    model.save_pretrained(folder)
    return delta


@pytest.mark.slow
def test_merges(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = gpt_oss(tmp_path / "base")
    delta = lora(tmp_path / "lora")
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "dense")
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "part", quantized="partial")
    dense, part = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "part"))
    up, down = (
        read_by_transformers(*(tensors[f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales")))
        for name in ("gate_up_proj", "down_proj")
    )
    exact = (up.double() + delta).bfloat16()
    assert (dense[f"{EXPERTS}.gate_up_proj"] != exact).double().mean() <= 1e-3
    assert torch.equal(dense[f"{EXPERTS}.down_proj"], down.bfloat16())
    assert torch.equal(part[f"{EXPERTS}.gate_up_proj"], dense[f"{EXPERTS}.gate_up_proj"])
    assert part.keys() == dense.keys()  # the experts of a layer are one module of transformers
    stated = json.loads((tmp_path / "part" / "config.json").read_text())["quantization_config"]
    assert stated["modules_to_not_convert"] == ["model.layers.*.self_attn", "lm_head", EXPERTS]
    report = loratools.merge(
        tmp_path / "base", tmp_path / "lora", tmp_path / "codes", quantized="requantize", force=True
    )
    codes = load_file(tmp_path / "codes" / "model.safetensors")
    changed = {name for name in codes if not torch.equal(codes[name], tensors[name])}
    assert changed == {f"{EXPERTS}.gate_up_proj_blocks", f"{EXPERTS}.gate_up_proj_scales"}  # some blocks grew
    again = read_by_transformers(*(codes[f"{EXPERTS}.gate_up_proj_{part}"] for part in ("blocks", "scales"))).double()
    kept = float(((again - up.double()) * delta).sum() / delta.square().sum())
    assert report.recoded == {f"{EXPERTS}.gate_up_proj": pytest.approx(kept, abs=0.01)}
    for name in ("dense", "part", "codes"):
        assert loratools.verify(tmp_path / name, tmp_path / "base", tmp_path / "lora").ok
    ids = torch.arange(20).view(1, -1)
    logits = []
    for name in ("dense", "part"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        weights = model.model.layers[0].mlp.experts
        assert torch.equal(weights.gate_up_proj.data.bfloat16(), dense[f"{EXPERTS}.gate_up_proj"])
        assert torch.equal(weights.down_proj.data.bfloat16(), dense[f"{EXPERTS}.down_proj"])
        logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "tensor", "sentence"),
    [
        ("scales", torch.zeros(E, 2 * I, 5, dtype=torch.uint8), "do not fit each other"),
        ("blocks", torch.zeros(E, 2 * I, 3, 8, dtype=torch.uint8), "do not fit each other"),
        ("blocks", torch.zeros(E, 2 * I, 48, dtype=torch.uint8), r"its blocks are U8 \[3, 128, 48\]"),
        ("blocks", torch.zeros(E, 2 * I, 3, 16), "its blocks are F32"),
    ],
)
def test_blocks_and_scales_that_do_not_fit(part: str, tensor: torch.Tensor, sentence: str, tmp_path: Path) -> None:
    tensors = gpt_oss(tmp_path / "base") | {f"{EXPERTS}.gate_up_proj_{part}": tensor}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedAdapter, match=rf"gate_up_proj is quantized with MXFP4: .*{sentence}"):
        logical(Checkpoint.open(tmp_path / "base"))
