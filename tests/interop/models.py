"""Tiny random models of the families that people train adapters for, and adapters that PEFT makes for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

H, F, V, LAYERS, HEADS = 32, 48, 64, 2, 4
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_BERT = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_GPT = {"vocab_size": V, "n_embd": H, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, **_TOKENS}
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_VIT = {**_VISION, "num_hidden_layers": LAYERS}


@dataclass(frozen=True)
class Family:
    """A model class of transformers with a tiny config, and which linear layers it has.

    `linear` counts the modules that PEFT finds with `all-linear`, `attention` those with the names in `targets`.
    """

    model: str
    config: str
    targets: tuple[str, ...]
    attention: int
    linear: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **changes: Any) -> Any:
        """Return the model with random weights, the same every time."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.settings, **changes})
        return getattr(transformers, self.model)(config)


_SELF = ("q_proj", "k_proj", "v_proj", "o_proj")
_VIT_SELF = ("q_proj", "k_proj", "v_proj", "attention.o_proj")
_BERT_SELF = ("query", "key", "value", "attention.output.dense")
FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", ("c_attn", "attn.c_proj"), 4, 8, _GPT),
    "gpt2-headless": Family("GPT2Model", "GPT2Config", ("c_attn", "attn.c_proj"), 4, 8, _GPT),
    "gpt2-square": Family("GPT2LMHeadModel", "GPT2Config", ("c_attn", "attn.c_proj"), 4, 8, {**_GPT, "n_inner": H}),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _SELF, 8, 14, _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _SELF, 8, 14, _LLAMA),
    "mistral": Family("MistralForCausalLM", "MistralConfig", _SELF, 8, 14, _LLAMA),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", _SELF, 8, 14, {**_LLAMA, "head_dim": 16}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", _SELF, 8, 14, {**_LLAMA, "head_dim": 16}),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _SELF, 8, 14, {**_LLAMA, "head_dim": 16}),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", ("qkv_proj", "o_proj"), 4, 8, _LLAMA),
    "bert": Family("BertForMaskedLM", "BertConfig", _BERT_SELF, 8, 13, _BERT),
    "bert-headless": Family("BertModel", "BertConfig", _BERT_SELF, 8, 13, _BERT),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", _BERT_SELF, 8, 14, _BERT),
    "deberta": Family(
        "DebertaModel", "DebertaConfig", ("in_proj", "pos_proj", "pos_q_proj"), 6, 12,
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", ("query_proj", "key_proj", "value_proj"), 6, 18,
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config", ("q", "k", "v", "o"), 24, 32,
        {"vocab_size": V, "d_model": H, "d_kv": 8, "d_ff": F, "num_layers": LAYERS, "num_heads": HEADS},
    ),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig", ("q_proj", "k_proj", "v_proj", "out_proj"), 8, 14,
        {"vocab_size": V, "hidden_size": H, "ffn_dim": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "word_embed_proj_dim": 16, "max_position_embeddings": 64, **_TOKENS},
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", ("query_key_value", "self_attention.dense"), 4, 8,
        {"vocab_size": V, "hidden_size": H, "n_layer": LAYERS, "n_head": HEADS, **_TOKENS},
    ),
    "gptj": Family(
        "GPTJForCausalLM", "GPTJConfig", ("q_proj", "k_proj", "v_proj", "out_proj"), 8, 12, {**_GPT, "rotary_dim": 8}
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", ("query_key_value", "attention.dense"), 4, 8,
        {**_BERT, "rotary_pct": 0.5},
    ),
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaConfig", _SELF[:3], 9, 22,
        {"vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_id": V - 1,
         "text_config": {"model_type": "llama", **_LLAMA}},
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", _SELF, 8, 20,
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": H, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 4},
         "text_config": {**_LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                                       "rope_theta": 1e4}}},
    ),
    "gemma3-vl": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Config", _SELF[:3], 9, 23,
        {"text_config": {**_LLAMA, "head_dim": 16}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", _VIT_SELF, 8, 13, _VIT),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", _VIT_SELF, 8, 13, _VIT),
    "beit": Family("BeitForImageClassification", "BeitConfig", _VIT_SELF, 8, 13, _VIT),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", _VIT_SELF, 8, 13, _VIT),
    "swin": Family(
        "SwinForImageClassification", "SwinConfig", _VIT_SELF, 8, 14,
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2},
    ),
    "segformer": Family(
        "SegformerForImageClassification", "SegformerConfig", _VIT_SELF, 8, 13,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
         "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
    ),
}  # fmt: skip

SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*\.0\..*(q|query|c_attn|query_key_value|k_proj|in_proj|SelfAttention\.v).*": 3},
        "alpha_pattern": {r".*\.1\..*": 5, r".*_proj.*|.*(dense|wi|wo).*": 7},  # these overlap: the first wins
    },
}


def adapt(model: Any, targets: Any, **settings: Any) -> Any:
    """Return a PEFT model around a copy of `model`, with random factors, as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets, **settings})
    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return peft


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model in a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def changed(base: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names whose bytes differ."""
    assert base.keys() == model.keys()
    return {
        name
        for name, W in base.items()
        if W.dtype != model[name].dtype or not torch.equal(W.view(torch.uint8), model[name].view(torch.uint8))
    }


def merge_by_peft(model: Any, adapter: Path) -> Any:
    """Return the model that PEFT makes of a copy of `model` and an adapter on disk."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload(safe_merge=False)
