"""Trained adapters merged into a trained language model: numbers, logits, text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify
from tests.surgery.models import units_off

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

PROMPT = "The module provides functions for creating and removing"


@pytest.fixture(scope="module", params=["smol-lora", "smol-rslora"])
def merged(
    request: pytest.FixtureRequest, real_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Base, adapter, and what `merge` made of them."""
    base, adapter = real_models / "smol-base", real_models / request.param
    out = tmp_path_factory.mktemp("real") / request.param
    merge(base, [adapter], out)
    return base, adapter, out


def updates(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (tensor of the base, s·B·A in float64), by PEFT's rules written out for these two configs."""
    from peft.utils.other import get_pattern_key

    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.endswith("lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = (file.get_tensor(name.replace("lora_A", factor)).double() for factor in ("lora_A", "lora_B"))
            ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
            assert len(A) == ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
            alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
            yield f"{module}.weight", alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A)) * (B @ A)


def test_every_tensor(merged: tuple[Path, Path, Path]) -> None:
    """Touched ones are W + s·B·A in float64, rounded once, but for ties, one unit off; the others keep their bytes."""
    base, out = Checkpoint.open(merged[0]), Checkpoint.open(merged[2])
    assert list(base.specs) == list(out.specs)
    off, count, touched = 0, 0, set()
    for name, delta in updates(merged[1]):
        W = base.read(name)
        units = units_off(out.read(name), (W.double() + delta).to(W.dtype))
        assert int(units.max()) <= 1
        off, count = off + int(torch.count_nonzero(units)), count + units.numel()
        touched.add(name)
    assert off <= count // 10_000
    assert len(touched) == (60 if merged[1].name == "smol-lora" else 210)
    for name in base.specs.keys() - touched:
        assert torch.equal(base.read(name).view(torch.int16), out.read(name).view(torch.int16))
    assert verify(merged[2], merged[0], [merged[1]]).ok
    assert verify(merged[2], merged[0], [merged[1]], exact=True).ok


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_and_text(merged: tuple[Path, Path, Path]) -> None:
    """All sums in float32. What is left is the rounding of the merged weights to bf16.

    That is random in effect; so the bound is what rounding W + s·B·A up or down by chance, without bias, makes of the
    logits. Measured: 1.3e-3 against 1.5e-3 (smol-lora) and 4.9e-3 against 6.8e-3 (smol-rslora) of their norm, which the
    adapters change by 0.24 and 0.23.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged[2])
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    base, model = load(merged[0]), load(merged[2])
    with torch.no_grad():
        before = base(ids).logits
        wanted = PeftModel.from_pretrained(base, merged[1]).eval()(ids).logits
        found = model(ids).logits
        text = model.generate(ids, max_new_tokens=12, do_sample=False)
        generator = torch.Generator().manual_seed(0)
        for name, delta in updates(merged[1]):
            exact = Checkpoint.open(merged[0]).read(name).double() + delta
            unit = 2.0 ** (exact.abs().log2().floor() - 7)
            noise = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
            model.get_parameter(name).copy_(torch.floor(exact / unit + noise) * unit)
        random = model(ids).logits
        error, allowed, moved = ((other - wanted).norm() / wanted.norm() for other in (found, random, before))
        assert float(error) <= 1.5 * float(allowed)
        assert float(error) < 0.2 * float(moved)
    assert text.shape[1] > ids.shape[1]
    assert len(tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True).strip()) > 3
