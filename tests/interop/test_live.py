"""LoRA on running models of transformers, judged by PEFT: logits, gradients, and what each of them saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratools
from loratools import live
from loratools.errors import WrongBase

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
LLAMA = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48}
MODELS: Mapping[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", LLAMA, ["q_proj", "v_proj", "down_proj"]),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 8}, ["q_proj", "o_proj", "embed_tokens"]),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"pad_token_id": 0}, ["qkv_proj", "gate_up_proj"]),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
        ["c_attn", "c_proj", "c_fc"],
    ),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "rotary_dim": 4},
        ["q_proj"],
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
        ["query_key_value"],
    ),
    "roberta": ("RobertaForMaskedLM", SMALL | {"intermediate_size": 48}, ["query", "value"]),
    "deberta": ("DebertaV2ForMaskedLM", SMALL | {"intermediate_size": 48}, ["query_proj", "value_proj"]),
    "opt": ("OPTForCausalLM", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, ["q_proj", "fc1"]),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    cls, fields, _ = MODELS[name]
    torch.manual_seed(seed)
    kind = getattr(transformers, cls)
    return kind(kind.config_class(**fields)).to(dtype).eval()


def tokens(rows: int = 3, columns: int = 7) -> torch.Tensor:
    return torch.randint(2, 61, (rows, columns), generator=torch.Generator().manual_seed(4))


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * 0.1 if parameter.dim() > 1 else parameter * (1 + 0.1 * noise))


def peft_model(name: str, dtype: torch.dtype, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": MODELS[name][2], "lora_dropout": 0.0} | options
    if name == "gpt2":
        settings["fan_in_fan_out"] = True
    model = peft.get_peft_model(build(name, dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    randomize(model)
    return model.to(dtype)


def factor(model: nn.Module, path: str, role: str) -> Any:
    """Return PEFT's parameter of a role on the module at a path."""
    module: Any = model.get_submodule(f"base_model.model.{path}")
    if role == "magnitude":
        return module.lora_magnitude_vector["default"].weight
    embedding = getattr(module, f"lora_embedding_{role}")
    return embedding["default"] if "default" in embedding else getattr(module, f"lora_{role}")["default"].weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_peft(name: str, dora: bool, tmp_path: Path) -> None:
    other = peft_model(name, torch.float64, use_dora=dora).eval()
    other.save_pretrained(tmp_path / "peft")
    model, x = build(name), tokens()
    base = model(x).logits
    lora = live.load(model, tmp_path / "peft", trainable=True)
    expected, y = other(x).logits, model(x).logits
    assert (expected - base).abs().max() > 1e-3
    assert (y - expected).abs().max() < 1e-12
    y.square().sum().backward()
    expected.square().sum().backward()
    count = 0
    for _, piece, path, _ in lora.children():
        for role in piece.roles:
            own, peer = getattr(piece, role).grad, factor(other, path, role).grad
            assert (own.flatten() - peer.flatten()).abs().max() <= 1e-6 * peer.abs().max() + 1e-12
            count += 1
    assert count == len(lora.parameters()) > 0
    lora.save(tmp_path / "ours")
    fresh = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").double().eval()
    assert (fresh(x).logits - y).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_sealed_with_the_files_of_the_base(name: str, tmp_path: Path) -> None:
    model = build(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    wide = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    lora = live.attach(wide, targets=MODELS[name][2], rank=2)
    for child in lora.parameters():
        nn.init.normal_(child, std=0.1)
    lora.save(tmp_path / "adapter")
    report = loratools.validate(tmp_path / "adapter", base=tmp_path / "base")
    assert report.valid, report
    merged = loratools.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="f32")
    assert merged
    result = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (result(tokens()).logits - wide.eval()(tokens()).logits).abs().max() < 1e-5
    wide.get_submodule(next(iter(lora.sites))).weight.data[0, 0] += 1
    with pytest.raises(WrongBase):
        live.load(copy.deepcopy(wide), tmp_path / "adapter", name="again")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["olora", "kaiming"])
def test_t5_in_float32_differs_merged_by_what_one_rounding_of_its_weights_does(init: live.Init) -> None:
    # T5 does not divide q·k by √d, so a trained model multiplies rounding by hundreds, however training started.
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=61)
    x = tokens()
    logits = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).to(dtype).eval()
        lora = live.attach(model, targets=["q", "v"], rank=8, alpha=16, init=init)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            logits[dtype] = [model(x, decoder_input_ids=x).logits]
            with lora.merged():
                logits[dtype].append(model(x, decoder_input_ids=x).logits)
            if dtype == torch.float64:
                for tensor in (*lora.parameters(), *(site.weight for site in lora.sites.values())):
                    tensor.mul_(1 + 2**-24 * (2 * torch.rand(tensor.shape, generator=generator) - 1))
                rounded = (model(x, decoder_input_ids=x).logits - logits[dtype][0]).abs().max()
    exact, merged = logits[torch.float64]
    assert (merged - exact).abs().max() < 1e-11
    for narrow in logits[torch.float32]:
        assert (narrow - exact).abs().max() < 10 * rounded
