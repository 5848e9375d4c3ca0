"""What headers say of a quantized model: schemes, bits, groups, what is plain, its parent, shapes of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loratools
from loratools.cli._run import run
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.quantization import quantization
from tests.make import fp8, gguf_models, tiny


def test_a_model_in_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny.llama_weights()
    fp8.save_llama(tmp_path / "base", weights)
    found = quantization(Checkpoint.open(tmp_path / "base"))
    assert found is not None
    (scheme,) = found.schemes
    assert (scheme.scheme, scheme.bits, scheme.modules) == ("FP8 with scales", 8, 14)
    assert scheme.targets == (
        "model.layers.[0-1].mlp.{down,gate,up}_proj",
        "model.layers.[0-1].self_attn.{k,o,q,v}_proj",
    )
    assert found.plain == ("lm_head", "model.embed_tokens")
    assert found.parameters == sum(W.numel() for W in weights.values())
    assert {each.name: each.shape for each in found.weights} == {
        name: tuple(W.shape) for name, W in weights.items() if "_proj" in name
    }
    assert found.parent is None
    assert run(["inspect", str(tmp_path / "base"), "--modules"]) == 0
    printed = capsys.readouterr().out
    assert "14 modules: FP8 with scales, FP8 E4M3" in printed
    assert "plain         lm_head, model.embed_tokens" in printed
    assert "made from     not stated" in printed


@pytest.mark.parametrize(
    "card",
    ["base_model: lab/parent\n", "license: mit\nbase_model:\n- lab/parent\ntags: [a]\n", 'base_model: "lab/parent"\n'],
)
def test_the_card_names_the_parent(card: str, tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "base", tiny.llama_weights())
    (tmp_path / "base" / "README.md").write_text(f"---\n{card}---\n\nbase_model: other\n")
    found = quantization(Checkpoint.open(tmp_path / "base"))
    assert found is not None
    assert found.parent == "lab/parent"


def test_config_names_the_parent(tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "base", tiny.llama_weights())
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "lab/other"}))
    found = quantization(Checkpoint.open(tmp_path / "base"))
    assert found is not None
    assert found.parent == "lab/other"


def test_a_gguf_file_and_a_plain_model(tmp_path: Path) -> None:
    gguf_models.save_llama(tmp_path / "model.gguf", tiny.llama_weights())
    found = quantization(Checkpoint.open(tmp_path / "model.gguf"))
    assert found is not None
    assert any("Q8_0" in each.label for each in found.schemes)
    tiny.save_llama(tmp_path / "plain", tiny.llama_weights())
    assert quantization(Checkpoint.open(tmp_path / "plain")) is None


def test_estimate_counts_the_weights_that_codes_stand_for(tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "codes", tiny.llama_weights())
    tiny.save_llama(tmp_path / "plain", tiny.llama_weights())
    codes, plain = (loratools.estimate(tmp_path / name, 8) for name in ("codes", "plain"))
    assert (codes.modules, codes.parameters, codes.base_parameters) == (
        plain.modules, plain.parameters, plain.base_parameters,
    )  # fmt: skip
    assert codes.base_nbytes < plain.base_nbytes
