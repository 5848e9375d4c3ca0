"""Heads that a class ties to its embedding by default, config.json silent: what transformers computes is the judge.

The judge is the installed transformers, and transformers 4 where LORATOOLS_TRANSFORMERS_4 names the Python of an
environment that has it (`pip install 'transformers<5' torch`; neither loratools nor PEFT): it only computes logits.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter.naming.selection import Selection
from loratools.errors import IncompatibleAdapter
from loratools.surgery.extract import extract
from loratools.surgery.inspect import CheckpointSummary, inspect
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify
from tests.interop import logits as other_environment

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

OTHER = os.environ.get("LORATOOLS_TRANSFORMERS_4")
IDS = torch.arange(3, 11)[None]
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}


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


def gemma() -> Any:
    config = transformers.GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def nllb() -> Any:
    config = transformers.M2M100Config(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.M2M100ForConditionalGeneration(config)


INPUTS: dict[str, dict[str, Any]] = {
    "whisper": {"input_features": torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16), "decoder_input_ids": IDS},
    "t5": SEQ2SEQ,
    "nllb": SEQ2SEQ,
}
MODELS: dict[str, Callable[[], Any]] = {each.__name__: each for each in (whisper, opt, gpt2, gemma, bert, t5, nllb)}

# The modules of one weight that an adapter changes, and by which policy that is merged.
CASES = [
    *((name, module, policy) for policy in ("untie", "both") for name, modules in {
        "whisper": ("model.decoder.embed_tokens", "proj_out"),
        "opt": ("model.decoder.embed_tokens", "lm_head"),
        "gpt2": ("transformer.wte", "lm_head"),
        "gemma": ("model.embed_tokens", "lm_head"),
        "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        "nllb": ("lm_head",),
    }.items() for module in modules),
    ("nllb", "model.shared", "both"), ("nllb", "model.decoder.embed_tokens", "both"),
    ("t5", "lm_head", "both"), ("t5", "shared", "both"), ("t5", "encoder.embed_tokens", "both"),
]  # fmt: skip
REFUSED = [
    ("t5", "lm_head", "scales the input of its head"),
    ("nllb", "model.shared", "transformers 4 keeps"),
    ("nllb", "model.decoder.embed_tokens", "transformers 4 keeps"),
]


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS.get(name, {"input_ids": IDS})).logits


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


def adapted(name: str, module: str, folder: Path) -> Any:
    """Save a model and a LoRA on one module of it; return the model with the LoRA on."""
    model = saved(name, folder / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=re.escape(module)))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder / "adapter")
    return tuned


def judged(name: str, module: str, policy: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """Merge by a policy; return the model class and the logits that PEFT computes: live, or merged into the tie."""
    tuned = adapted(name, module, folder)
    with pytest.raises(IncompatibleAdapter, match="ties its output head"):
        merge(folder / "base", folder / "adapter", folder / "none")
    merge(folder / "base", folder / "adapter", folder / "out", tied=policy)
    assert verify(folder / "out", folder / "base", folder / "adapter").ok
    kind = type(tuned.get_base_model())
    return kind, logits(tuned if policy == "untie" else tuned.merge_and_unload(), name)


@pytest.mark.parametrize(("name", "module", "policy"), CASES)
def test_the_merged_model_computes_what_peft_does(name: str, module: str, policy: str, tmp_path: Path) -> None:
    """Untied, PEFT changes the one module alone, and the other names keep their weight."""
    kind, right = judged(name, module, policy, tmp_path)
    torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / "out"), name), right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(kind.from_pretrained(tmp_path / "base"), name), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "module", "reason"), REFUSED)
def test_what_no_output_can_say_is_refused(name: str, module: str, reason: str, tmp_path: Path) -> None:
    adapted(name, module, tmp_path)
    with pytest.raises(IncompatibleAdapter, match=reason):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    assert not (tmp_path / "out").exists()


def job(kind: type, name: str, folder: Path) -> dict[str, str]:
    """Return what the other environment is to compute for a folder's output."""
    torch.save(INPUTS.get(name, {"input_ids": IDS}), folder / "inputs.pt")
    paths = {"model": folder / "out", "inputs": folder / "inputs.pt", "output": folder / "logits.pt"}
    return {"class": kind.__name__, **{key: str(path) for key, path in paths.items()}}


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="LORATOOLS_TRANSFORMERS_4 names no Python with transformers 4")
def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    jobs, rights = [], []
    for name, module, policy in CASES:
        folder = tmp_path / f"{name}-{module}-{policy}"
        kind, right = judged(name, module, policy, folder)
        jobs.append(job(kind, name, folder))
        rights.append(right)
    for name in MODELS:
        kind, right = fine_tuned(name, tmp_path / name)
        extract(tmp_path / name / "base", tmp_path / name / "tuned", tmp_path / name / "adapter", 16)
        merge(tmp_path / name / "base", tmp_path / name / "adapter", tmp_path / name / "out")
        jobs.append(job(kind, name, tmp_path / name))
        rights.append(right)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([str(OTHER), str(other_environment.__file__), str(tmp_path / "jobs.json")], check=True)
    assert (tmp_path / "jobs.version").read_text().startswith("4.")
    for each, right in zip(jobs, rights, strict=True):
        worst = float((torch.load(each["output"]) - right).abs().max())
        assert worst <= 1e-5 * float(right.abs().max()), f"{each['model']}: off by {worst}"


def fine_tuned(name: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """Save a model and a fine-tune of all that PEFT can change; return its class and the fine-tune's logits."""
    model = saved(name, folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed_positions" not in key:  # PEFT does not call Whisper's as the model does
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "tuned")
    return type(model), logits(model, name)


@pytest.mark.parametrize("kinds", ["linear", "linear,embedding"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_extraction_changes_every_name_of_the_weight(name: str, kinds: str, tmp_path: Path) -> None:
    """PEFT on the base computes what the fine-tune does; so does a merge, which is not asked what the adapter says."""
    kind, right = fine_tuned(name, tmp_path)
    selection = Selection(kinds=frozenset(kinds.split(",")))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", 16, selection=selection)
    live = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(live, name), right, rtol=1e-5, atol=1e-5)
    for policy in ("error", "untie", "both"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / policy, tied=policy)
        torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / policy), name), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=", ".join)
@pytest.mark.parametrize("name", ["gemma", "opt"])
def test_an_adapter_that_peft_keeps_tied_is_not_asked_about(name: str, targets: list[str], tmp_path: Path) -> None:
    """With `ensure_weight_tying` PEFT saves one change under every name."""
    model = saved(name, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, ensure_weight_tying=True)
    tuned = peft.get_peft_model(model, config)
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    for policy in ("error", "untie", "both"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / policy, tied=policy)
        merged = type(model).from_pretrained(tmp_path / policy)
        torch.testing.assert_close(logits(merged, name), logits(tuned, name), rtol=1e-5, atol=1e-5)


def test_a_base_with_both_stored_and_a_silent_config_is_untied_inspected_and_verified(tmp_path: Path) -> None:
    """As OPT was saved for years; the output stores the same names, so that only its config.json tells them apart."""
    adapted("opt", "lm_head", tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")

    def told(folder: Path) -> bool | None:
        summary = inspect(folder)
        assert isinstance(summary, CheckpointSummary)
        return summary.tied

    assert told(tmp_path / "base") is True
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert told(tmp_path / "base") is None
    with pytest.raises(IncompatibleAdapter, match="does not say whether they are tied"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    assert told(tmp_path / "out") is False
    assert verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok
