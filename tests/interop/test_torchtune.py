"""torchtune itself: its checkpointer writes what is read, its models compute what is merged and load what is written.

torchtune 0.6.1 wants torchao 0.9 or older and `datasets`; it is no requirement of these tests, which are skipped
where it cannot be imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools import dialects
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, RANK, ALPHA = 32, 48, 64, 4, 2, 4, 10
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


@pytest.fixture(scope="module", autouse=True)
def torchtune() -> Any:
    try:
        from torchtune.training import FullModelHFCheckpointer
    except ImportError as error:
        pytest.skip(f"torchtune cannot be imported: {' '.join(str(error).split())[:120]}")
    return FullModelHFCheckpointer


@dataclass(frozen=True)
class Family:
    """A model in transformers and in torchtune; `exact`: whether torchtune's PEFT file is what its model computes."""

    config: str
    builder: str
    kind: str
    exact: bool
    theirs: dict[str, Any]
    head: bool = True


FAMILIES = {
    "llama": Family("LlamaConfig", "llama3.lora_llama3", "LLAMA3", True, {"rope_base": 10_000}),
    "mistral": Family("MistralConfig", "mistral.lora_mistral", "MISTRAL", True, {}),
    # The base's q and k are not permuted and the adapter's are: what torchtune exports for Qwen2 is another adapter.
    "qwen2": Family("Qwen2Config", "qwen2.lora_qwen2", "QWEN2", False, {"rope_base": 10_000.0, "norm_eps": 1e-6}),
    "gemma": Family("GemmaConfig", "gemma.lora_gemma", "GEMMA", True, {"head_dim": 8}, head=False),
}


@dataclass
class Trained:
    """A base, torchtune's model on it with an adapter of random numbers, and the folder that its checkpointer wrote."""

    base: Path
    epoch: Path
    model: Any

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(TOKENS)
        return logits.double()


@pytest.fixture
def trained(tmp_path: Path, torchtune: Any) -> Callable[..., Trained]:
    """Return `trained(family, dora)`."""

    def make(family: str, dora: bool = False) -> Trained:
        import importlib

        import transformers
        from torchtune.modules.peft import get_adapter_state_dict

        shape = FAMILIES[family]
        torch.manual_seed(0)
        config = getattr(transformers, shape.config)(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HIDDEN // HEADS, rms_norm_eps=1e-6,
            max_position_embeddings=64, tie_word_embeddings=not shape.head, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / "base")
        saved = json.loads((tmp_path / "base" / "config.json").read_text())
        saved.setdefault("tie_word_embeddings", not shape.head)
        (tmp_path / "base" / "config.json").write_text(json.dumps(saved))

        checkpointer = torchtune(
            str(tmp_path / "base"), ["model.safetensors"], shape.kind, str(tmp_path / "run"), safe_serialization=True
        )
        package, _, builder = shape.builder.partition(".")
        modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
        known: dict[str, Any] = {
            "vocab_size": VOCABULARY, "num_layers": 2, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
            "embed_dim": HIDDEN, "intermediate_dim": INNER, "max_seq_len": 64, "norm_eps": 1e-6,
            "lora_rank": RANK, "lora_alpha": ALPHA, "use_dora": dora, **shape.theirs,
        }  # fmt: skip
        if shape.head:
            known["apply_lora_to_output"] = not dora
        lora = getattr(importlib.import_module(f"torchtune.models.{package}"), builder)(modules, True, **known)
        missing, unexpected = lora.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
        assert not unexpected
        assert all("lora" in name or "magnitude" in name for name in missing)
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
                elif "magnitude" in name:
                    parameter.uniform_(0.3, 0.9)
        targets = [*modules, "w1", "w2", "w3", *(["output"] if known.get("apply_lora_to_output") else [])]
        checkpointer.save_checkpoint(
            {
                "adapter": get_adapter_state_dict(lora.state_dict()),
                "adapter_config": {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "peft_type": "LORA"},
            },
            epoch=0,
            adapter_only=True,
        )
        return Trained(tmp_path / "base", tmp_path / "run" / "epoch_0", lora.eval())

    return make


def logits(folder: Path) -> torch.Tensor:
    """Return what transformers computes with a model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_computes_what_torchtune_does(
    family: str, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    theirs = trained(family)
    base = Checkpoint.open(theirs.base)
    adapter = dialects.open_adapter(theirs.epoch / "adapter_model.pt", base=base)
    assert adapter.dialect == "torchtune"
    assert len(adapter.updates) == 2 * 7 + FAMILIES[family].head
    assert (logits(theirs.base) - theirs.logits()).abs().max() > 0.1  # the adapter does something
    merge(base, [adapter], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), theirs.logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_file_for_peft_has_the_same_factors_where_it_is_right(family: str, trained: Callable[..., Trained]) -> None:
    theirs = trained(family)
    adapter = dialects.open_adapter(theirs.epoch / "adapter_model.pt", base=Checkpoint.open(theirs.base))
    exported = load_file(theirs.epoch / "adapter_model.safetensors")
    state = {f"base_model.model.{name}": lazy.load() for name, lazy in adapter.tensors().items()}
    assert state.keys() == exported.keys()
    differ = {name for name in state if not torch.equal(state[name], exported[name])}
    turned = {name for name in state if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight"))}
    assert differ == (set() if FAMILIES[family].exact else turned)
    assert dialects.detect(dialects.Listing.of(theirs.epoch))[0] == "peft"  # the folder is read by its PEFT files


def test_dora_is_what_torchtune_computes(trained: Callable[..., Trained], tmp_path: Path) -> None:
    theirs = trained("llama", dora=True)
    base = Checkpoint.open(theirs.base)
    adapter = dialects.open_adapter(theirs.epoch / "adapter_model.pt", base=base)
    assert {update.kind for update in adapter.updates.values()} == {"dora"}
    # Its file for PEFT has q and k with their rows turned, but not their magnitudes: another adapter.
    exported = load_file(theirs.epoch / "adapter_model.safetensors")
    differ = {name for name, lazy in adapter.tensors().items() if not torch.equal(lazy.load(), _named(exported, name))}
    assert {name.rpartition("self_attn.")[2] for name in differ} == {
        "q_proj.lora_magnitude_vector", "k_proj.lora_magnitude_vector",
    }  # fmt: skip
    merge(base, [adapter], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), theirs.logits(), rtol=1e-5, atol=1e-5)


def _named(exported: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return an exported tensor; torchtune puts `.weight` behind a magnitude's name."""
    key = f"base_model.model.{name}"
    return exported[key] if key in exported else exported[f"{key}.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_torchtune_loads_what_is_written(family: str, trained: Callable[..., Trained], tmp_path: Path) -> None:
    """From PEFT's layout to torchtune's: loaded into its model, the outputs are those of before."""
    theirs = trained(family)
    before = theirs.logits()
    base = Checkpoint.open(theirs.base)
    adapter = dialects.open_adapter(theirs.epoch / "adapter_model.pt", base=base)
    convert(adapter, tmp_path / "peft", to="peft", base=base)
    convert(tmp_path / "peft", tmp_path / "tune", to="torchtune", base=base, allow_loss=True)
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    state = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    missing, unexpected = theirs.model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    torch.testing.assert_close(theirs.logits(), before, rtol=1e-6, atol=1e-6)
