"""bitsandbytes: what the library quantized reads as the library reads it; a merge is what transformers then loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.decisions import warnings_to
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.files import chunks, read_tensor
from tests.storage.codecs.bnb_models import SHAPES, M, eight_bit, exact, four_bit
from tests.storage.codecs.loads import load, logits
from tests.storage.codecs.recode import opened, recoded
from tests.surgery.models import lora, random, same_bytes, save_adapter, save_base


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_4_bit_weight_reads_as_the_library_reads_it(
    tmp_path: Path, shape: tuple[int, ...], kind: str, double: bool, storage: torch.dtype
) -> None:
    W = random(*shape)
    W.view(-1)[0] = 0
    stored = four_bit(W, kind, double, storage)
    view, encoding = opened(tmp_path / "base", stored)
    name = encoding.name
    assert set(view.specs) == {name}
    assert (encoding.shape, encoding.bits, encoding.group) == (shape, 4, (1, 64))
    assert torch.equal(read_tensor(view.specs[name]), exact(stored, name))
    pieces = b"".join(bytes(piece) for piece in chunks(view.specs[name], 1004))
    assert pieces == read_tensor(view.specs[name]).numpy().tobytes()


@pytest.mark.parametrize("shape", [(64, 128), (128, 256)])
def test_whole_blocks_read_as_the_public_call_reads_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = random(*shape, dtype=torch.bfloat16)
    view, encoding = opened(tmp_path / "base", four_bit(W, "nf4", True))
    codes, state = functional.quantize_4bit(W, compress_statistics=True, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(read_tensor(view.specs[encoding.name]).bfloat16(), theirs)


def test_int8_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = random(48, 40, dtype=torch.bfloat16)
    W[5] = 0
    stored = eight_bit(W)
    view, _ = opened(tmp_path / "base", stored)
    theirs = functional.int8_vectorwise_dequant(stored[f"{M}.weight"], stored[f"{M}.SCB"])
    ours = read_tensor(view.specs[f"{M}.weight"])
    assert torch.equal(ours, theirs)


def test_a_stack_of_experts_as_the_library_parametrizes_it(tmp_path: Path) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    W = random(3, 40, 64, dtype=torch.bfloat16)
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(W)
    parametrize.replace_parameter_4bit(experts, "gate_up_proj", compress_statistics=True, quant_type="nf4")
    theirs = experts.gate_up_proj.detach()
    stored = {f"model.layers.0.mlp.experts.{name}": value for name, value in experts.state_dict().items()}
    view, encoding = opened(tmp_path / "base", stored)
    assert encoding.name == "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(read_tensor(view.specs[encoding.name]).bfloat16(), theirs)


def test_scales_in_another_shard(tmp_path: Path) -> None:
    stored = four_bit(random(64, 128), "nf4", True)
    base = save_base(tmp_path / "base", dict(sorted(stored.items())), shards=3, model_type="llama")
    view = logical(Checkpoint.open(base))
    assert torch.equal(read_tensor(view.specs[f"{M}.weight"]), exact(stored, f"{M}.weight"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a huge shape": ({"shape": [1 << 40, 1 << 40]}, "bytes of codes"),
    "a shape that is no list": ({"shape": "64"}, "shape '64'"),
    "a side of nothing": ({"shape": [0, 8192]}, r"shape \[0, 8192\]"),
    "a side that is true": ({"shape": [True, 8192]}, "shape"),
    "no block": ({"blocksize": 0}, "blocksize 0"),
    "another block": ({"blocksize": 128}, "there are 64 blocks"),
    "the other type": ({"quant_type": "fp4"}, "quant_type 'fp4'"),
    "no offset": ({"nested_offset": "x"}, "nested_offset 'x'"),
    "no size": ({"nested_blocksize": -1}, "nested_blocksize -1"),
    "another size": ({"nested_blocksize": 1}, "nested_absmax"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    fields, why = WRONG[case]
    stored = four_bit(random(64, 128), "nf4", True)
    name = f"{M}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[name].tolist())) | fields
    stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(UnsupportedAdapter, match=f"{M} is quantized with bitsandbytes NF4: .*{why}"):
        opened(tmp_path / "base", stored)


@pytest.mark.parametrize("raw", [b"{", b"[" * 60000, b'{"shape": [1, 1], "shape": [1, 1]}', b"\xff", b" " * 70000])
def test_a_state_that_is_no_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    stored = four_bit(random(64, 128), "fp4", False)
    stored[f"{M}.weight.quant_state.bitsandbytes__fp4"] = torch.tensor(list(raw), dtype=torch.uint8)
    with pytest.raises(UnsupportedAdapter, match="bitsandbytes FP4: its quant_state is"):
        opened(tmp_path / "base", stored)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good, whole = four_bit(random(64, 128), "nf4", False), eight_bit(random(8, 8))
    start = f"{M}.weight"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({k: v for k, v in good.items() if "quant_state" not in k}, {}, "4 bit: its quant_state.* is missing"),
        ({k: v for k, v in good.items() if not k.endswith("quant_map")}, {}, "quant_map is missing"),
        (good | {f"{start}.quant_map": torch.zeros(16)}, {}, "quant_map has one number for several codes"),
        (good | {f"{start}.quant_map": torch.zeros(15)}, {}, "16 numbers were expected"),
        (good | {f"{start}.absmax": torch.zeros(127)}, {}, "there are 128 blocks"),
        (good | {start: good[start][:-1]}, {}, "4095 bytes of codes"),
        (good | {start: good[start].view(1, -1)}, {}, r"its codes are \[1, 4096\]"),
        (good, {"quant_method": "gptq"}, "config.json says 'gptq'"),
        (good, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit"),
        (whole | {f"{M}.SCB": torch.zeros(7)}, {}, "int8 .*one number a row"),
        (whole | {f"{M}.weight_format": torch.tensor(1, dtype=torch.uint8)}, {}, "weight_format is not 0"),
        ({k: v for k, v in whole.items() if k != start}, {}, "weight is missing"),
    ]
    for number, (stored, stated, why) in enumerate(cases):
        with pytest.raises(UnsupportedAdapter, match=why):
            opened(tmp_path / str(number), stored, model_type="llama", quantization_config=stated)


def tiny(folder: Path, **quantization: Any) -> Path:
    """Save a small Llama as transformers quantizes it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = folder.with_name(f"{folder.name}-plain")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    load(plain, quantization_config=transformers.BitsAndBytesConfig(**quantization)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
)
def test_transformers_loads_what_a_merge_leaves(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """Partial: the same codes but for the merged modules. Dequantized: no bitsandbytes. Both have PEFT's logits."""
    peft = pytest.importorskip("peft")
    base = tiny(tmp_path / "base", **quantization)
    shapes = {"model.layers.0.self_attn.o_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}
    adapter = lora(shapes, scale=0.4)
    path = save_adapter(tmp_path / "lora", adapter)
    plain = logits(load(base))
    wanted = logits(peft.PeftModel.from_pretrained(load(base), path))
    effect = torch.linalg.vector_norm(wanted - plain)
    for policy in ("partial", "dequantize"):
        loratools.merge(base, path, tmp_path / policy, quantized=policy)
        merged = load(tmp_path / policy)
        assert torch.linalg.vector_norm(logits(merged) - wanted) <= 0.03 * effect
    stored, before = (load_file(tmp_path / name / "model.safetensors") for name in ("partial", "base"))
    touched = {name for name in before if any(name.startswith(f"{module}.") for module in shapes)}
    assert stored.keys() - before.keys() == set()
    assert before.keys() - stored.keys() == touched - {f"{module}.weight" for module in shapes}
    assert all(same_bytes(stored[name], before[name]) for name in stored.keys() - touched)
    view = logical(Checkpoint.open(base))
    for module in shapes:
        exact_sum = read_tensor(view.specs[f"{module}.weight"]).double() + adapter.delta(module)
        assert (stored[f"{module}.weight"] != exact_sum.float().bfloat16()).double().mean() <= 1e-3
    skipped = json.loads((tmp_path / "partial" / "config.json").read_text())["quantization_config"]
    assert set(skipped["llm_int8_skip_modules"]) >= {*shapes, "lm_head"}
    names = {type(module).__name__ for name, module in load(tmp_path / "partial").named_modules() if name in shapes}
    assert names == {"Linear"}


@pytest.mark.parametrize("double", [False, True])
def test_codes_are_read_and_written_by_the_numbers_that_the_file_gives(tmp_path: Path, double: bool) -> None:
    """Sixteen other numbers, in no order: a code stands for what `quant_map` has at its place, and it is said."""
    stored = four_bit(random(64, 128), "nf4", double)
    table = (torch.randperm(16, generator=torch.Generator().manual_seed(3)).float() - 7) / 8
    usual = stored[f"{M}.weight.quant_map"].double()
    by_usual = exact(stored, f"{M}.weight").double().reshape(-1, 64)
    codes = stored[f"{M}.weight"].reshape(-1, 1).view(torch.uint8)
    places = torch.cat([codes >> 4, codes & 15], dim=1).reshape(-1, 64).long()
    top = usual[places].abs().argmax(dim=1, keepdim=True)
    absmax = by_usual.gather(1, top) / usual[places].gather(1, top)
    stored[f"{M}.weight.quant_map"] = table
    with warnings_to((warnings := list[str]()).append):
        view, encoding = opened(tmp_path / "base", stored)
    assert [warning for warning in warnings if "not that of NF4" in warning]
    ours = read_tensor(view.specs[encoding.name]).double().reshape(-1, 64)
    torch.testing.assert_close(ours, table.double()[places] * absmax, rtol=1e-6, atol=0)
    again, numbers = recoded(encoding, ours.float().numpy(), "own")
    assert np.array_equal(again["weight"].reshape(-1).view(np.uint8), codes.numpy().reshape(-1))
    assert np.array_equal(numbers.reshape(-1, 64), ours.float().numpy())
