"""GPT-2 in bitsandbytes: codes of [out, in] are read, written and merged where a plain weight is [in, out]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.storage.codecs import Grid
from loratools.storage.files import read_tensor
from tests.storage.codecs.bnb_models import M, eight_bit, exact, four_bit
from tests.storage.codecs.loads import load, logits
from tests.storage.codecs.recode import held, opened, recoded
from tests.surgery.models import random

LAYER = "transformer.h.0.mlp.c_proj"


def gpt2(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the same parts under the name of a Conv1D."""
    return {name.replace(M, LAYER): tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("shape", [(40, 64), (64, 64), (13, 21), (7, 100)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4 twice", "int8"])
def test_codes_read_and_are_written_transposed(tmp_path: Path, scheme: str, shape: tuple[int, int]) -> None:
    def stored(W: Tensor) -> dict[str, Any]:
        return gpt2(eight_bit(W) if scheme == "int8" else four_bit(W, scheme[:3], "twice" in scheme))

    W, V = random(*shape), random(*shape, seed=3)
    view, encoding = opened(tmp_path / "gpt2", stored(W), model_type="gpt2")
    straight, other = opened(tmp_path / "llama", stored(W), model_type="llama")
    numbers = read_tensor(view.specs[f"{LAYER}.weight"])
    assert torch.equal(numbers, read_tensor(straight.specs[f"{LAYER}.weight"]).T)
    if scheme != "int8":
        assert torch.equal(numbers.T, exact(stored(W), f"{LAYER}.weight"))
    grids: list[tuple[Grid, Any]] = [("own", numbers.numpy()), ("own", V.T.numpy()), ("fresh", V.T.numpy())]
    for grid, turned in grids:
        parts, values = recoded(encoding, np.ascontiguousarray(turned), grid)
        wanted, theirs = recoded(other, np.ascontiguousarray(turned.T), grid)
        assert parts.keys() == wanted.keys()
        assert all(parts[part].tobytes() == wanted[part].tobytes() for part in parts)
        assert np.array_equal(values, theirs.T)
    assert recoded(encoding, numbers.numpy(), "own")[0]["weight"].tobytes() == held(encoding)["weight"].tobytes()


@pytest.mark.parametrize("shape", [(64, 64), (48, 64)])
def test_what_codes_lose_of_a_turned_weight_is_kept_as_peft_has_it(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows, columns = shape
    stored = gpt2(four_bit(random(*shape), "nf4", False))
    opened(tmp_path / "base", stored, model_type="gpt2")
    A, B = random(4, columns, seed=4), random(rows, 4, seed=5)
    start = f"base_model.model.{LAYER}"
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    loratools.merge(tmp_path / "base", tmp_path / "lora", out, quantized="requantize", keep_loss=64, force=True)
    loratools.merge(out, out / "loss", tmp_path / "whole", dtype="f32")
    wanted = exact(stored, f"{LAYER}.weight").double() + B.double() @ A.double()
    whole = load_file(tmp_path / "whole" / "model.safetensors")[f"{LAYER}.weight"].double().T
    assert torch.linalg.vector_norm(whole - wanted) <= 1e-5 * torch.linalg.vector_norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_transformers_loads_a_merged_gpt2(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """The head is tied to the embedding and has no name of its own: the list of plain modules has it all the same."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=64)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    base = tmp_path / "base"
    load(tmp_path / "plain", quantization_config=transformers.BitsAndBytesConfig(**quantization)).save_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(base), settings)
    adapted.save_pretrained(tmp_path / "lora")
    wanted = logits(adapted)
    effect = torch.linalg.vector_norm(wanted - logits(load(base)))
    for policy in ("partial", "dequantize"):
        loratools.merge(base, tmp_path / "lora", tmp_path / policy, quantized=policy)
        assert torch.linalg.vector_norm(logits(load(tmp_path / policy)) - wanted) <= 0.03 * effect
    stored = load_file(tmp_path / "partial" / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
    listed = json.loads((tmp_path / "partial" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in listed["llm_int8_skip_modules"]
