"""Every kind of adapter that PEFT and we both read, on a running model: PEFT's logits, also trained, saved, merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import live

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
GROUPED = SIDES | {"num_key_value_heads": 2}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIDES),
    "tied": ("LlamaForCausalLM", SIDES | {"tie_word_embeddings": True}),
    "opt": ("OPTForCausalLM", SIDES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        GROUPED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        GROUPED | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 5},
                           "alpha_pattern": {"v_proj": 9}}),
    "saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows of tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]}),
    "rows of a tied embedding": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]}),
    "rows beside a changed head": ("tied", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [7]}),
    "other rows of the head": ("tied", {"target_modules": ["q_proj"],
                                        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "bias of B": ("opt", {"target_modules": ["q_proj"], "lora_bias": True}),
    "all biases": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of targets": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "experts (E, out, in)": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts (E, in, out)": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts and a head": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1],
                                       "modules_to_save": ["lm_head"]}),
}  # fmt: skip


def build(name: str) -> Any:
    cls, fields = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    model = kind(kind.config_class(**fields)).double().eval()
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    return model


def trained_by_peft(name: str, options: dict[str, Any], folder: Path) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=3, **options)
    model = peft.get_peft_model(build(name), config, autocast_adapter_dtype=False).double().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_running_model_computes_as_peft_does(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    other, x = trained_by_peft(name, options, tmp_path / "peft"), torch.arange(2, 23).reshape(3, 7)
    base = build(name)
    expected, y = other(x).logits, base(x).logits
    assert (expected - y).abs().max() > 1e-4
    for trainable in (False, True):
        model = copy.deepcopy(base)
        lora = live.load(model, tmp_path / "peft", trainable=trainable)
        assert (model(x).logits - expected).abs().max() < 1e-12
        with lora.merged():
            assert (model(x).logits - expected).abs().max() < 1e-6
        with lora.off():
            assert torch.equal(model(x).logits, y)
        if trainable:
            model(x).logits.square().sum().backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
            lora.save(tmp_path / "ours")
            back = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").double().eval()
            assert (back(x).logits - expected).abs().max() < 1e-12


def test_beside_prefix_tuning_as_in_the_papers_appendix() -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama").float(), prefix).eval()
    x = torch.arange(2, 23).reshape(3, 7)
    with torch.no_grad():
        y = model(input_ids=x).logits
        lora = live.attach(model, targets=["q_proj", "v_proj"], rank=2)
        assert torch.equal(model(input_ids=x).logits, y)
        assert all(p.requires_grad is False for n, p in model.named_parameters() if "prompt_encoder" in n)
        for _, piece, _, _ in lora.children():
            piece.B.normal_(std=0.1)
        changed = model(input_ids=x).logits
        assert (changed - y).abs().max() > 1e-4
        with lora.merged():
            assert (model(input_ids=x).logits - changed).abs().max() < 1e-5
    lora.detach()
    assert any(p.requires_grad for n, p in model.named_parameters() if "prompt_encoder" in n)
