"""Heads that a class ties to its embedding by default, config.json silent: what transformers computes is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import IncompatibleAdapter
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge
from tests.surgery.models import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(3, 11)[None]


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


INPUTS: dict[str, dict[str, Any]] = {
    "whisper": {"input_features": torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16), "decoder_input_ids": IDS},
    "opt": {"input_ids": IDS},
    "gpt2": {"input_ids": IDS},
}
MODELS = {make.__name__: make for make in (whisper, opt, gpt2)}
EMBEDDING = {"whisper": "decoder.embed_tokens", "opt": "embed_tokens", "gpt2": "wte"}


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS[name]).logits


def saved(name: str, folder: Path) -> Any:
    """Save a random model, and return it; its config.json says nothing of the tie."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    config = folder / "config.json"
    lines = [line for line in config.read_text().splitlines() if "tie_word_embeddings" not in line]
    config.write_text("\n".join(lines))
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_untied_it_computes_what_peft_does(name: str, tmp_path: Path) -> None:
    """PEFT changes the embedding alone, and the head keeps its weight."""
    model = saved(name, tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=[EMBEDDING[name]]))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleAdapter, match="ties its output head"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    assert len(load(tmp_path / "out")) == len(load(tmp_path / "base")) + 1
    merged = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, name), logits(tuned, name), rtol=1e-5, atol=1e-5)


def test_an_extraction_changes_the_head_with_the_embedding(tmp_path: Path) -> None:
    base = saved("gpt2", tmp_path / "base")
    with torch.no_grad():
        for weight in (base.transformer.wte.weight, base.transformer.h[0].mlp.c_fc.weight):
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    base.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", 16)
    model = peft.PeftModel.from_pretrained(gpt2().from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(model, "gpt2"), logits(base, "gpt2"), rtol=1e-5, atol=1e-5)
