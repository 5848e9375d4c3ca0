"""Quantized models of mlx-lm with mlx-lm's own adapters: the merged model, run by mlx-lm, is base and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratools
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.files import read_tensor
from tests.storage.codecs.recode import saved_lora

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "tie_word_embeddings": False,
}  # fmt: skip
MOE = LLAMA | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 64, "rope_theta": 1e4, "max_position_embeddings": 64,
    "norm_topk_prob": True,
}  # fmt: skip
KEYS = {
    "llama": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    "qwen3_moe": ["self_attn.q_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"],
}


def base_of(folder: Path, config: dict[str, Any], bits: int, mode: str) -> Path:
    """Write a quantized model as `mlx_lm.convert -q` does, without a tokenizer."""
    from importlib import import_module

    from mlx_lm.utils import quantize_model, save_config, save_model

    module: Any = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    model.set_dtype(mx.bfloat16)
    size = {"affine": 64, "mxfp4": 32, "nvfp4": 16}[mode]
    model, stated = quantize_model(model, dict(config), size, bits, mode=mode)
    save_model(folder, model)
    save_config(stated, folder / "config.json")
    (folder / "model.safetensors.index.json").unlink()
    return folder


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    """Return a model of mlx-lm in float32, with an adapter of mlx-lm that it loads itself."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if adapter:
        model = load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    return model


def adapter_of(folder: Path, base: Path, keys: list[str]) -> Path:
    """Write an adapter of mlx-lm with numbers at random."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    model, _ = load_model(base)
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    trained = {name: mx.random.normal(array.shape) / 10 for name, array in tree_flatten(model.trainable_parameters())}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def logits(model: Any) -> np.ndarray[Any, Any]:
    ids = mx.array(np.random.default_rng(0).integers(0, 96, (2, 12)))
    return np.array(model(ids).astype(mx.float32))


@pytest.mark.parametrize(
    ("config", "bits", "mode"), [(LLAMA, 4, "affine"), (LLAMA, 6, "affine"), (LLAMA, 4, "nvfp4"), (MOE, 4, "affine")]
)
def test_a_merged_model_is_base_and_adapter(tmp_path: Path, config: dict[str, Any], bits: int, mode: str) -> None:
    base = base_of(tmp_path / "base", config, bits, mode)
    adapter = adapter_of(tmp_path / "lora", base, KEYS[config["model_type"]])
    before, wanted = logits(loaded(base)), logits(loaded(base, adapter))
    effect = np.linalg.norm(wanted - before)
    off = {}
    for policy in ("dequantize", "partial", "requantize"):
        options: dict[str, Any] = {"force": True} if policy == "requantize" else {}
        loratools.merge(base, adapter, tmp_path / policy, quantized=policy, **options)
        off[policy] = np.linalg.norm(logits(loaded(tmp_path / policy)) - wanted) / effect
    assert off["dequantize"] < 0.03  # BF16 weights
    assert off["partial"] < 0.03
    assert 0.03 < off["requantize"] < 0.8  # what rounding to codes costs; nothing of the adapter would be 1


def test_embedding_and_head_are_codes_too(tmp_path: Path) -> None:
    """And an adapter of PEFT's names merges into them: mlx-lm keeps those of Hugging Face."""
    base = base_of(tmp_path / "base", LLAMA, 4, "affine")
    model = logical(Checkpoint.open(base))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= model.specs.keys()
    delta = saved_lora(tmp_path / "lora", "lm_head", (96, 64))
    loratools.merge(base, tmp_path / "lora", tmp_path / "out", quantized="partial")
    exact = read_tensor(model.specs["lm_head.weight"]).double() + delta
    out = Checkpoint.open(tmp_path / "out")
    assert (read_tensor(out.specs["lm_head.weight"]) != exact.bfloat16()).double().mean() <= 1e-3
    assert read_tensor(out.specs["model.embed_tokens.weight"]).dtype == torch.uint32
    assert loaded(tmp_path / "out").lm_head.weight.shape == (96, 64)
