"""Bases that may be folded: told by config.json or llm-compressor's recipe; a warning of every merge into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from loratools.decisions import warnings_to
from loratools.errors import BadFile, WrongBase
from loratools.storage.codecs.folded import folded
from tests.storage.codecs.recode import Q, saved_lora
from tests.storage.codecs.test_awq import awq_base, awq_module
from tests.storage.codecs.test_gptq import COLUMNS, ROWS, gptq_base, gptq_module
from tests.surgery.models import save_base

RECIPE = """
default_stage:
  default_modifiers:
    {name}Modifier:
      targets: [Linear]
      ignore: [lm_head]
"""


@pytest.mark.parametrize(
    ("stated", "word"),
    [
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, "W8A8_SQ_PER_CHANNEL"),
        ({"quant_method": "awq", "autoround_version": "0.5"}, None),
        ({"quant_method": "gptq"}, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None),
        ({}, None),
    ],
)
def test_what_config_says(stated: dict[str, Any], word: str | None, tmp_path: Path) -> None:
    why = folded(stated, tmp_path)
    assert (why is None) if word is None else why is not None and word in why


@pytest.mark.parametrize("name", ["AWQ", "SmoothQuant", "LogarithmicEqualization"])
def test_what_a_recipe_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(name=name))
    assert str(folded({"quant_method": "compressed-tensors"}, tmp_path)).startswith(f"{name} moves scales")
    for other in ("GPTQ", "Quantization"):
        (tmp_path / "recipe.yaml").write_text(f"# not {name}Modifier" + RECIPE.format(name=other))
        assert folded({"quant_method": "compressed-tensors"}, tmp_path) is None
    (tmp_path / "recipe.yaml").write_bytes(b" " * (1 << 21))
    with pytest.raises(BadFile, match="no recipe"):
        folded({}, tmp_path)


def merged(base: Path, tmp_path: Path, **options: Any) -> list[str]:
    said: list[str] = []
    with warnings_to(said.append):
        loratools.merge(base, tmp_path / "lora", tmp_path / "out", force=True, **options)
    return [text for text in said if "another basis" in text]


def test_a_merge_warns_by_name_with_the_reason(tmp_path: Path) -> None:
    saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    awq = awq_base(tmp_path / "awq", {Q: awq_module()[0]})
    for policy in ("dequantize", "partial"):
        [text] = merged(awq, tmp_path, quantized=policy)
        assert text.startswith(f"{awq} may be another basis")
        assert "AWQ divides norms by scales" in text
    gptq = gptq_base(tmp_path / "gptq", {Q: gptq_module(4, 32)[0]})
    assert merged(gptq, tmp_path) == []
    (gptq / "recipe.yaml").write_text(RECIPE.format(name="SmoothQuant"))
    [text] = merged(gptq, tmp_path)
    assert "SmoothQuant moves scales between norms and the weights behind them (recipe.yaml)" in text


def test_a_model_of_other_numbers_is_not_the_original_of_a_folded_base(tmp_path: Path) -> None:
    parts, W = awq_module()
    base = awq_base(tmp_path / "base", {Q: parts})
    head = torch.ones(10, COLUMNS, dtype=torch.float16)
    other = {f"{Q}.weight": W.half().roll(1, 1).contiguous(), "lm_head.weight": head}
    original = save_base(tmp_path / "original", other, model_type="llama")
    saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    for policy in ("dequantize", "partial", "requantize"):
        with pytest.raises(WrongBase, match="is not the model that was folded"):
            merged(base, tmp_path, quantized=policy, original=original)
