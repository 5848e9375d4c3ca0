"""transformers' own FP8: what its quantizer writes reads as it loads it, is written byte for byte, and runs merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.files import read_tensor
from tests.surgery.models import lora, same_bytes, save_adapter

pytestmark = pytest.mark.slow

STATED: dict[str, dict[str, Any]] = {
    "blocks": {"weight_block_size": (128, 128)},
    "other blocks": {"weight_block_size": (64, 32)},
    "powers of two": {"weight_block_size": (128, 128), "scale_fmt": "ue8m0"},
    "MXFP8": {"weight_block_size": (1, 32), "scale_fmt": "ue8m0"},
    "by tensor": {"weight_block_size": None},
    "static": {"weight_block_size": None, "activation_scheme": "static"},
}


def quantizer(stated: dict[str, Any], plain: list[str]) -> Any:
    transformers = pytest.importorskip("transformers")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = transformers.FineGrainedFP8Config(modules_to_not_convert=plain, **stated)
    return fp8.Fp8Quantize(SimpleNamespace(quantization_config=config)), config


def saved(folder: Path, model: Any, stated: dict[str, Any], plain: list[str], shards: int = 1) -> dict[str, Tensor]:
    """Write the model as transformers quantizes it, its scales in the last shard; return its weights before that."""
    operation, config = quantizer(stated, plain)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, W in weights.items():
        made = operation.convert({name: W}) if "_proj" in name else {name: W}
        if stated.get("activation_scheme") == "static" and len(made) > 1:
            made[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
        tensors |= made
    said = json.loads(config.to_json_string(use_diff=False))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return weights
    (folder / "model.safetensors").unlink()
    apart = {name: "scale" in name for name in tensors}
    for last in (False, True):
        some = {name: tensor for name, tensor in tensors.items() if apart[name] is last}
        save_file(some, folder / f"model-0000{last + 1}-of-00002.safetensors", {"format": "pt"})
    index = {name: f"model-0000{last + 1}-of-00002.safetensors" for name, last in apart.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights


def llama(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16()


def loaded(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.arange(24).reshape(2, 12)).logits.double()
    return out


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stated", STATED)
def test_a_model_reads_as_transformers_loads_it(tmp_path: Path, stated: str, shards: int) -> None:
    saved(tmp_path / "base", llama(1), STATED[stated], ["lm_head"], shards)
    view = logical(Checkpoint.open(tmp_path / "base"))
    theirs = loaded(tmp_path / "base").state_dict()
    assert view.specs.keys() == theirs.keys()
    assert len(encodings(view)) == 7
    for name, W in theirs.items():
        assert torch.equal(read_tensor(view.specs[name]).bfloat16(), W), name


@pytest.mark.parametrize("stated", STATED)
def test_fresh_scales_and_codes_have_its_bytes(tmp_path: Path, stated: str) -> None:
    """Of random weights, with a block of zeros; they would differ if W were divided by the scales."""
    weights = saved(tmp_path / "base", llama(1), STATED[stated], ["lm_head"])
    stored = load_file(tmp_path / "base" / "model.safetensors")
    operation, _ = quantizer(STATED[stated], ["lm_head"])
    for name, encoding in encodings(logical(Checkpoint.open(tmp_path / "base"))).items():
        W = weights[name].float() * 1.7
        W[:128, :128] = 0
        theirs = operation.convert({name: W})
        with encoding.parts() as parts:
            encoder = encoding.encoder(parts, "fresh")
            rows = [slice(start, start + 128) for start in range(0, len(W), 128)]
            for each in rows if encoder.needs_pass else ():
                encoder.observe(each.start, W[each].numpy())
            decoded = np.concatenate([encoder.encode(each.start, W[each].numpy()) for each in rows])
            made = encoder.finish()
        assert made.keys() == {"weight", "weight_scale_inv"}
        scale = torch.from_numpy(made["weight_scale_inv"])
        wanted = theirs[f"{name.removesuffix('weight')}weight_scale_inv"]
        assert wanted.dtype == stored[f"{name}_scale_inv"].dtype
        assert torch.equal(scale.view(wanted.dtype).double().reshape(-1), wanted.double().reshape(-1)), name
        assert same_bytes(torch.from_numpy(made["weight"]), theirs[name].view(torch.uint8)), name
        assert np.isfinite(decoded).all()


def test_stacks_of_experts(tmp_path: Path) -> None:
    """As `Fp8Quantize` writes them, gate and up in one, and per expert or per projection one scale."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(1)
    for stated, of_gate_and_up in (
        ("blocks", False),
        ("other blocks", False),
        ("by tensor", False),
        ("by tensor", True),
    ):
        operation, config = quantizer(STATED[stated], [])
        W = torch.randn(3, 256, 128) / 20
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors = operation.convert({name: W.reshape(6, 128, 128) if of_gate_and_up else W})
        tensors[name] = tensors[name].reshape(3, 256, 128)
        if of_gate_and_up:
            tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].reshape(3, 2, 1)
        folder = tmp_path / f"{stated}{of_gate_and_up}"
        folder.mkdir()
        save_file({**tensors, f"{name}_activation_scale": torch.ones(3)}, folder / "model.safetensors")
        said = {"quantization_config": json.loads(config.to_json_string(use_diff=False))}
        (folder / "config.json").write_text(json.dumps(said))
        view = logical(Checkpoint.open(folder))
        assert view.specs.keys() == {name}
        theirs = fp8.Fp8Dequantize(operation.hf_quantizer)._dequantize_one(
            tensors[name], tensors[f"{name}_scale_inv"], torch.float32
        )
        assert torch.equal(read_tensor(view.specs[name]), theirs), stated
        (encoding,) = encodings(view).values()
        with encoding.parts() as parts:
            encoder = encoding.encoder(parts, "own")
            flat = theirs.reshape(-1, 128).numpy()
            for start in range(0, len(flat), 256):
                encoder.encode(start, flat[start : start + 256])
            assert encoder.finish()["weight"].tobytes() == tensors[name].view(torch.uint8).numpy().tobytes()


def test_a_merge_runs_as_the_base_with_the_adapter(tmp_path: Path) -> None:
    """Every policy; the codes that were not touched are the base's, and transformers loads the mix."""
    peft = pytest.importorskip("peft")
    saved(tmp_path / "base", llama(), STATED["blocks"], ["lm_head"], shards=2)
    shapes = {"model.layers.0.self_attn.o_proj": (256, 256), "model.layers.1.mlp.down_proj": (256, 384)}
    path = save_adapter(tmp_path / "lora", lora(shapes, scale=1.0))
    plain, wanted = (
        logits(loaded(tmp_path / "base")),
        logits(peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), path)),
    )
    effect = torch.linalg.vector_norm(wanted - plain)
    before = Checkpoint.open(tmp_path / "base")
    for policy, most in (("dequantize", 0.02), ("partial", 0.02), ("requantize", 0.2)):
        out = tmp_path / policy
        loratools.merge(tmp_path / "base", path, out, quantized=policy)  # type: ignore[arg-type]
        assert torch.linalg.vector_norm(logits(loaded(out)) - wanted) <= most * effect, policy
        assert loratools.verify(out, tmp_path / "base", path).ok
        after = Checkpoint.open(out)
        kept = [name for name in before.specs if not any(name.startswith(f"{module}.") for module in shapes)]
        if policy != "dequantize":
            assert all(same_bytes(after.read(name), before.read(name)) for name in kept)


def test_one_expert_makes_its_layer_plain(tmp_path: Path) -> None:
    """transformers puts the experts of a layer in one module, and would not load a mix of codes and numbers."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    saved(tmp_path / "base", model, STATED["blocks"], ["lm_head", *gates])
    base = loaded(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[],
        target_parameters=["layers.1.mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "lora")
    wanted = logits(adapted)
    with adapted.disable_adapter():
        effect = torch.linalg.vector_norm(wanted - logits(adapted))
    loratools.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", quantized="partial")
    assert torch.linalg.vector_norm(logits(loaded(tmp_path / "out")) - wanted) <= 0.05 * effect
    merged = load_file(tmp_path / "out" / "model.safetensors")
    experts = {name: W.dtype for name, W in merged.items() if ".experts." in name and name.endswith("_proj.weight")}
    assert len(experts) == 24
    assert {name for name, dtype in experts.items() if dtype == torch.bfloat16} == {
        name for name in experts if name.startswith("model.layers.1.")
    }
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", *gates, "model.layers.1.mlp.experts"]
