"""Contents from strangers, wrong or hostile: a sentence, no output, and no endless work."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.errors import (
    BadFile,
    IncompatibleAdapter,
    LoraToolsError,
    UnsupportedAdapter,
)
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import MergeOptions, merge, prepare
from tests.faults import mutate
from tests.faults.expect import edit, outcome, refused
from tests.make import tiny

Q0 = "model.layers.0.self_attn.q_proj"


def test_a_claim_of_a_giant_header(model: Path) -> None:
    raw = (model / "adapter" / "adapter_model.safetensors").read_bytes()
    (model / "adapter" / "adapter_model.safetensors").write_bytes((10**8).to_bytes(8, "little") + raw[8:])
    refused(BadFile, "a header of 100000000 bytes in a file of", model)


def test_tensors_that_share_bytes(model: Path) -> None:
    """A file whose factors overlap is no safetensors file."""
    path = model / "adapter" / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name.endswith("q_proj.lora_A.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    refused(BadFile, "overlaps another tensor|a hole before it", model)


def test_tied_factors_in_a_pickle_are_two_tensors(model: Path) -> None:
    """Sharing is plain in torch's own files: each name is read for itself."""
    factors = tiny.lora_factors()
    A, B = factors[Q0]
    tied = {module: (A, B) if module.endswith("q_proj") else pair for module, pair in factors.items()}
    state = {}
    for module, (A, B) in tied.items():
        state |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    (model / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(state, model / "adapter" / "adapter_model.bin")
    merge(model / "base", [model / "adapter"], model / "out")
    expected = tiny.merged_weights(tiny.llama_weights(), tied, 2.0)
    checkpoint = Checkpoint.open(model / "out")
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_that_are_not_finite(model: Path, part: str, value: float, dtype: torch.dtype) -> None:
    path = model / "adapter" / "adapter_model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    state[f"base_model.model.{Q0}.{part}.weight"][1, 2] = value
    save_file(state, path)
    error = refused(IncompatibleAdapter, "NaN or infinite", model)
    assert Q0 in error.message


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,)])
def test_empty_factors(model: Path, shape: tuple[int, ...]) -> None:
    path = model / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    state[f"base_model.model.{Q0}.lora_A.weight"] = torch.zeros(shape)
    save_file(state, path)
    refused(BadFile, "empty or flattened", model)


def test_values_that_overflow_the_base_s_dtype(model: Path) -> None:
    weights = {name: tensor.half() for name, tensor in tiny.llama_weights().items()}
    for path in (model / "base").iterdir():
        path.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    error = refused(IncompatibleAdapter, "not finite in F16", model, weights=[1e7])
    assert "model.layers." in error.message


def test_numbers_that_no_one_trains(model: Path) -> None:
    """A rank or an alpha from the config is never an allocation, and never silently infinite."""
    config = model / "adapter" / "adapter_config.json"
    edit(config, r=2**31 - 1)
    refused(BadFile, r"problems? in this adapter", model)
    edit(config, r=4, rank_pattern={Q0: 10**9})
    refused(BadFile, r"problems? in this adapter", model)
    edit(config, rank_pattern={}, lora_alpha=1e299)
    refused(LoraToolsError, "not finite|infinite", model)
    edit(config, lora_alpha=1e308)
    refused(BadFile, "lora_alpha: expected a number", model)


# Every one of these takes a backtracking matcher longer than anyone waits, on names as short as a model's.
SLOW = [
    "(a+)+$", "(.*)*x", "((q|q_)*)*!", "(.|\\w)*!", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*!", "(.*){20}!",
    "(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)!",
    "(.?){60}.{60}!", "(?=(.*.*.*.*.*.*.*.*.*.*.*.*)!)x", ".*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?!",
]  # fmt: skip


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("pattern", SLOW)
def test_regular_expressions_that_never_end(model: Path, field: str, pattern: str) -> None:
    edit(model / "adapter" / "adapter_config.json", layers_to_transform=[0, 1])
    value: Any = {pattern: 4} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    if field == "target_modules":
        edit(model / "adapter" / "adapter_config.json", layers_to_transform=None)
    edit(model / "adapter" / "adapter_config.json", **{field: value})
    result = outcome(lambda: dialects.open_adapter(model / "adapter"))
    assert isinstance(result, str) or result.updates.keys() == tiny.lora_factors().keys()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("depth", [100, 500, 900, 990, 100_000])
def test_json_nested_deeply(model: Path, name: str, depth: int) -> None:
    """Read where Python can read it and write it again, refused where not."""
    path = model / ("base" if name == "config.json" else "adapter") / name
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + f', "deep": {"[" * depth}{"]" * depth}}}')
    result = outcome(lambda: merge(model / "base", [model / "adapter"], model / "out", dtype="F32"))
    if isinstance(result, str):
        assert "nested too deeply" in result
        assert not (model / "out").exists()
    else:
        json.loads((model / "out" / "config.json").read_text())
    assert not list(model.glob(".*"))


def test_a_hostile_config_of_the_base(model: Path) -> None:
    """Whatever config.json says: the right tensors, or a sentence."""
    chance = random.Random(3)
    path = model / "base" / "config.json"
    document = json.loads(path.read_text()) | {"text_config": {"model_type": "llama", "tie_word_embeddings": False}}
    document |= {"n_head": 4, "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "x"}}
    adapters = {
        "q": tiny.lora_factors(),
        "fused": {"model.layers.0.self_attn.qkv_proj": (torch.ones(2, 64), torch.ones(128, 2))},
        "head": {"lm_head": (torch.ones(2, 64), torch.ones(128, 2))},
    }
    for name, factors in adapters.items():
        tiny.save_peft(model / f"adapter-{name}", factors)
    done = 0
    for number in range(150):
        path.write_text(json.dumps(mutate.json_value(document, chance)))
        name, dtype = chance.choice(sorted(adapters)), chance.choice([None, "F32"])
        options = MergeOptions(dtype=dtype)
        decide = partial(prepare, model / "base", model / f"adapter-{name}", model / "out", options=options)
        if not isinstance(prepared := outcome(decide), str):
            done += 1
            touched = set(prepared.plan.touched())
            assert name != "q" or touched == {f"{module}.weight" for module in adapters["q"]}, number
    assert done >= 50


def test_a_quantized_target_is_refused(model: Path) -> None:
    weights = tiny.llama_weights()
    weights[f"{Q0}.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    for old in (model / "base").iterdir():
        old.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    error = refused(IncompatibleAdapter, "quantized", model)
    assert error.problems == (f"{Q0}: I8 codes",)


def test_an_unsupported_adapter_is_named(model: Path) -> None:
    edit(model / "adapter" / "adapter_config.json", use_qalora=True)
    error = refused(UnsupportedAdapter, "does not read this adapter", model)
    assert any("QA-LoRA" in problem for problem in error.problems)
