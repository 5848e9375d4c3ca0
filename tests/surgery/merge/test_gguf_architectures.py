"""Adapters merged into GGUF files of each architecture: tensors, and llama.cpp's logits, are those of base + adapter.

The judge is PEFT in transformers, whose merged model is written as llama.cpp's converter would (`tests/make`); and
where its libraries are at hand llama.cpp itself, which loads base and merged file.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from tests.make import gguf_models, gguf_transformers, llama

gguf = pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

TOKENS = [1, 5, 9, 3, 77]
needs_llama_cpp = pytest.mark.skipif(llama.folder() is None, reason="llama.cpp's libraries are not here")
CASES = [pytest.param(case, marks=[] if case in ("llama", "qwen3moe", "falcon") else pytest.mark.slow)
         for case in gguf_transformers.KINDS]  # fmt: skip


def trained(folder: Path, case: str, *, dora: bool = False) -> Any:
    """Write base.gguf and the adapter for all linear layers and stacks of experts; return PEFT's model."""
    made = gguf_transformers.model(gguf_transformers.KINDS[case])
    gguf_transformers.save(folder / "base.gguf", case, made)
    stacked = any("experts.down_proj" in name for name, _ in made.named_parameters())
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if stacked and not dora else None
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", target_parameters=stacks, use_dora=dora,
        init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # of Conv1D, and of stacks
        adapted = peft.get_peft_model(made, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + ("magnitude" in name) * parameter)
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.parametrize("case", CASES)
def test_a_merged_file_is_the_merged_model_converted(tmp_path: Path, case: str) -> None:
    adapted = trained(tmp_path, case)
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    assert loratools.verify(tmp_path / "out.gguf", tmp_path / "base.gguf", tmp_path / "adapter").ok
    expected = gguf_transformers.save(tmp_path / "expected.gguf", case, adapted.merge_and_unload())
    before, after, wanted = (gguf_models.read(tmp_path / f"{name}.gguf") for name in ("base", "out", "expected"))
    assert expected.is_file()
    assert list(after) == list(wanted)
    changed = 0
    for name, (_, W) in wanted.items():
        torch.testing.assert_close(after[name][1], W, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(before[name][1], W)
    assert changed >= 8


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("case", gguf_transformers.KINDS)
def test_llama_cpp_computes_what_base_and_adapter_do(tmp_path: Path, case: str) -> None:
    adapted = trained(tmp_path, case)
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    with adapted.disable_adapter():
        without = gguf_transformers.logits(adapted, TOKENS)
    expected = gguf_transformers.logits(adapted, TOKENS)
    effect = float((expected - without).abs().max())
    for name, wanted in (("base", without), ("out", expected)):
        ours = torch.from_numpy(llama.logits(tmp_path / f"{name}.gguf", TOKENS))
        assert float((ours - wanted).abs().max()) < 0.01 * effect


@pytest.mark.parametrize("case", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_dora_follows_the_rows(tmp_path: Path, case: str) -> None:
    adapted = trained(tmp_path, case, dora=True)
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    gguf_transformers.save(tmp_path / "expected.gguf", case, adapted.merge_and_unload())
    after, wanted = (gguf_models.read(tmp_path / f"{name}.gguf") for name in ("out", "expected"))
    for name, (_, W) in wanted.items():
        torch.testing.assert_close(after[name][1], W, rtol=1e-4, atol=1e-5)
