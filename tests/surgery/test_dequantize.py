"""`dequantize`: every code becomes its number, rounded once; all else stays byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import IncompatibleAdapter, LoraToolsError
from loratools.linalg import native
from loratools.linalg.native import codes
from tests.conftest import clean_env
from tests.make import fp8, tiny


def test_codes_become_their_numbers(tmp_path: Path) -> None:
    weights = tiny.llama_weights()
    fp8.save_llama(tmp_path / "base", weights)
    report = loratools.dequantize(tmp_path / "base", tmp_path / "out", verify=True)
    stored, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert plain.keys() == weights.keys()
    for name, W in plain.items():
        exact = fp8.decoded(stored, name.removesuffix(".weight")) if f"{name}_scale_inv" in stored else stored[name]
        assert torch.equal(W, exact.float().bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert report.modules == sum(report.schemes.values()) == 14
    assert all("FP8 E4M3" in label for label in report.schemes)
    assert report.verified == len(weights)
    assert report.root == loratools.hash(tmp_path / "out", "root").root


def test_a_model_without_codes_is_told_so(tmp_path: Path) -> None:
    tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    with pytest.raises(LoraToolsError, match="is not quantized"):
        loratools.dequantize(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_is_not_read_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny.save_llama(tmp_path / "base", tiny.llama_weights(), shards=1)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    del tensors[f"{path}.weight"]
    tensors |= {f"{path}.trellis": torch.zeros(2, 2, 16, dtype=torch.int16), f"{path}.suh": torch.zeros(32).half()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(IncompatibleAdapter, match="EXL3"):
        loratools.dequantize(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


PROGRAM = """
import sys
import loratools
loratools.dequantize("base", "plain")
loratools.merge("base", "adapter", "merged", retention="full")
print("torch" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not (native.available() and codes.available()), reason="installed without a C compiler")
def test_codes_are_decoded_merged_and_rounded_without_torch(tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "base", tiny.llama_weights())
    tiny.save_peft(tmp_path / "adapter", factors := tiny.lora_factors())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=clean_env(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    stored = load_file(tmp_path / "base" / "model.safetensors")
    plain, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "merged"))
    for name, W in merged.items():
        path = name.removesuffix(".weight")
        assert path in factors or torch.equal(W, plain[name]), name
        if path in factors:
            A, B = (factor.double() for factor in factors[path])
            exact = fp8.decoded(stored, path) + 2 * B @ A
            assert torch.count_nonzero(exact.to(W.dtype) != W) <= 1e-3 * W.numel()
