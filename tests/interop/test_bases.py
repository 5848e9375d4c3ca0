"""Bases that are not stored under the adapter's names: other prefixes, no config, fused projections, tied heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter
from loratools.surgery.merge import merge
from tests.interop.models import FAMILIES, adapt, changed, load, merge_by_peft

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(3, 19).reshape(2, 8)


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename the tensors of a model in one file; None drops one."""
    tensors = {new: W for name, W in load(folder).items() if (new := change(name))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def expect_weights_of_peft(model: Any, adapter: Path, base: Path, out: Path, count: int) -> None:
    """Assert that a merge changed `count` tensors, and gave all the numbers that PEFT gives, past prefixes."""
    report = merge(base, [adapter], out)
    wanted = {normalized(name): W for name, W in merge_by_peft(model, adapter).state_dict().items()}
    after = load(out)
    touched = changed(load(base), after)
    assert (report.changed, len(touched)) == (count, count)
    for name in touched:
        torch.testing.assert_close(after[name], wanted[normalized(name)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("trained", "stored", "lacks"),
    [
        ("gpt2", "gpt2-headless", 0),
        ("gpt2-headless", "gpt2", 0),
        ("bert", "bert-headless", 1),
        ("bert-headless", "bert", 1),
    ],
)
def test_base_with_and_without_its_head(trained: str, stored: str, lacks: int, tmp_path: Path) -> None:
    """The head's class puts a prefix before every name; its own layers are then not to be found."""
    one, other = FAMILIES[trained].build(), FAMILIES[stored].build()
    bodies = [getattr(model, model.base_model_prefix, model) for model in (one, other)]
    bodies[1].load_state_dict(bodies[0].state_dict(), strict=False)
    other.save_pretrained(tmp_path / "base")
    adapt(one, list(FAMILIES[trained].targets)).save_pretrained(tmp_path / "adapter")
    expect_weights_of_peft(one, tmp_path / "adapter", tmp_path / "base", tmp_path / "out", FAMILIES[trained].attention)
    if lacks:
        adapt(one, "all-linear").save_pretrained(tmp_path / "all")
        with pytest.raises(IncompatibleAdapter) as refusal:
            merge(tmp_path / "base", [tmp_path / "all"], tmp_path / "none")
        lost = "cls.predictions.transform.dense" if trained == "bert" else "pooler.dense"
        assert [problem.split(":")[0] for problem in refusal.value.problems] == [lost]
        assert not (tmp_path / "none").exists()


LAYOUTS: dict[str, Callable[[str], str]] = {
    "transformers 4": lambda name: f"language_model.{name}" if "vision" not in name else name,
    "transformers 5": lambda name: name.replace("model.", "model.language_model.", 1) if name[:5] == "model" else name,
    "no prefix": lambda name: name.removeprefix("model."),
    "towers renamed": lambda name: name.replace("vision_tower.", "model.vision_tower.vision_model."),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_prefixes_that_drift(layout: str, tmp_path: Path) -> None:
    """One Llama text model under the names of both generations of multimodal checkpoints."""
    name = "llava" if layout == "towers renamed" else "llama"
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path / "base")
    rename(tmp_path / "base", LAYOUTS[layout])
    adapt(model, "all-linear").save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.changed == FAMILIES[name].linear
    if name == "llama":
        expect = merge_by_peft(model, tmp_path / "adapter").state_dict()
        for key, W in load(tmp_path / "out").items():
            wanted = expect.get(f"model.{normalized(key)}", expect.get(normalized(key)))
            torch.testing.assert_close(W, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-square", "llama", "bert", "gptj"])
def test_base_without_config(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    adapt(model, "all-linear").save_pretrained(tmp_path / "adapter")
    expect_weights_of_peft(model, tmp_path / "adapter", tmp_path / "base", tmp_path / "out", FAMILIES[name].linear)


def test_square_conv1d_alone_without_config(tmp_path: Path) -> None:
    """The biases of other layers tell how attn.c_proj is stored, or fan_in_fan_out; with neither it is refused."""
    model = FAMILIES["gpt2"].build()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    adapt(model, ["attn.c_proj"]).save_pretrained(tmp_path / "adapter")
    expect_weights_of_peft(model, tmp_path / "adapter", tmp_path / "base", tmp_path / "out", 2)
    rename(tmp_path / "base", lambda name: None if name.endswith("bias") else name)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "told")
    told, out = load(tmp_path / "told"), load(tmp_path / "out")
    assert all(torch.equal(W, out[name]) for name, W in told.items())
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": False}))
    with pytest.raises(IncompatibleAdapter) as refusal:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "none")
    assert len(refusal.value.problems) == 2
    assert "square" in refusal.value.problems[0]


SAME = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def phi3_of(llama: Any) -> Any:
    """Return the Phi-3 with the numbers of a Llama: the same function, q, k, v and gate, up fused."""
    phi3 = FAMILIES["phi3"].build(**SAME)
    state = llama.state_dict()
    for layer in range(2):
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            block = f"model.layers.{layer}.{fused.split('.')[0]}"
            pieces = [state.pop(f"{block}.{part}_proj.weight") for part in parts]
            state[f"model.layers.{layer}.{fused}.weight"] = torch.cat(pieces)
    phi3.load_state_dict(state)
    return phi3


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    """A Llama and the Phi-3 that computes the same."""
    llama = FAMILIES["llama"].build(**SAME).eval()
    phi3 = phi3_of(llama).eval()
    with torch.no_grad():
        torch.testing.assert_close(phi3(IDS).logits, llama(IDS).logits, rtol=1e-5, atol=1e-5)
    return llama, phi3


@pytest.mark.parametrize("trained", ["llama", "phi3"])
def test_split_and_fused(twins: tuple[Any, Any], trained: str, tmp_path: Path) -> None:
    """The merged model computes what the other model computes with the adapter that was made for it."""
    from transformers import AutoModelForCausalLM

    source, target = twins if trained == "llama" else twins[::-1]
    peft = adapt(source, "all-linear").eval()
    peft.save_pretrained(tmp_path / "adapter")
    target.save_pretrained(tmp_path / "base")
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.changed == (8 if trained == "llama" else 14)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted, before = peft(IDS).logits, source(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert float((wanted - before).abs().max()) > 0.1


def tied_llama(folder: Path) -> Any:
    model = FAMILIES["llama"].build(tie_word_embeddings=True).eval()
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load(folder)
    return model


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Any, Any]:
    """A Llama with a tied head in base/, and a PEFT model with an adapter on the head and on q_proj, in adapter/."""
    model = tied_llama(tmp_path / "base")
    peft = adapt(model, ["q_proj", "lm_head"]).eval()
    peft.save_pretrained(tmp_path / "adapter")
    return model, peft


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return logits


def test_tied_head_is_refused_until_a_policy_is_named(tied: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(IncompatibleAdapter, match="ties its output head") as refusal:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert refusal.value.problems == ("lm_head: shares its weight",)
    assert not (tmp_path / "out").exists()


def test_untied_head_computes_what_peft_computes_unmerged(tied: tuple[Any, Any], tmp_path: Path) -> None:
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", tied="untie")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), tied[1](IDS).logits, rtol=1e-5, atol=1e-5)


def test_both_computes_what_peft_computes_merged(tied: tuple[Any, Any], tmp_path: Path) -> None:
    """PEFT's merge adds to the storage that both share."""
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", tied="both")
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert "model.embed_tokens.weight" in changed(before, after)
    wanted = merge_by_peft(tied[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), wanted(IDS).logits, rtol=1e-5, atol=1e-5)
        assert float((wanted(IDS).logits - tied[1](IDS).logits).abs().max()) > 0.01


def test_head_under_its_old_name(tmp_path: Path) -> None:
    """GPT-NeoX stores its head as `embed_out`; transformers 5 calls it `lm_head`."""
    model = FAMILIES["gpt_neox"].build()
    model.save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in load(tmp_path / "base")
    adapt(model, ["lm_head", "dense"]).save_pretrained(tmp_path / "adapter")
    expect_weights_of_peft(model, tmp_path / "adapter", tmp_path / "base", tmp_path / "out", 3)
