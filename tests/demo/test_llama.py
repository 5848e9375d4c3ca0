"""The demo's forward pass, against transformers and PEFT, and its data, against what PROVENANCE.md records."""

from __future__ import annotations

import hashlib
import json
import math
import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.demo import data_folder
from loratools.demo.llama import CONTEXT, Adam, Factors, LlamaShape, forward, generate, held_out_loss

DATA = data_folder()


@cache
def base() -> tuple[dict[str, Tensor], LlamaShape]:
    weights = {name: t for file in sorted((DATA / "base").glob("*.safetensors")) for name, t in load_file(file).items()}
    return weights, LlamaShape.from_config(json.loads((DATA / "base/config.json").read_text()))


@cache
def adapter() -> Factors:
    config = json.loads((DATA / "adapter/adapter_config.json").read_text())
    saved = load_file(DATA / "adapter/adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in saved}
    return {
        module: (
            saved[f"base_model.model.{module}.lora_A.weight"],
            saved[f"base_model.model.{module}.lora_B.weight"],
            config["lora_alpha"] / config["r"],
        )
        for module in modules
    }


def merged() -> dict[str, Tensor]:
    weights, _ = base()
    result = dict(weights)
    for module, (A, B, scaling) in adapter().items():
        W = weights[f"{module}.weight"]
        result[f"{module}.weight"] = (W.double() + scaling * B.double() @ A.double()).float().to(W.dtype)
    return result


def recorded() -> dict[str, list[float]]:
    """The rows of PROVENANCE.md's table: text -> losses of base, base + adapter, merged."""
    rows = re.findall(r"^\| (\w+\.txt) \|(.*)\|$", (DATA / "PROVENANCE.md").read_text(), re.MULTILINE)
    return {text: [float(cell) for cell in cells.split("|")] for text, cells in rows}


@pytest.mark.parametrize("text", ["bible.txt", "plays.txt"])
def test_losses_are_those_recorded(text: str) -> None:
    weights, shape = base()
    data = (DATA / text).read_bytes()
    measured = [
        held_out_loss(weights, shape, data),
        held_out_loss(weights, shape, data, adapter()),
        held_out_loss(merged(), shape, data),
    ]
    assert measured == pytest.approx(recorded()[text], abs=1e-3)


def test_the_model_has_learned_and_the_adapter_teaches_it_plays() -> None:
    bible, plays = recorded()["bible.txt"], recorded()["plays.txt"]
    assert bible[0] < 1.5  # the entropy of letters drawn by their frequency is about 2.9
    assert plays[1] < plays[0] - 0.3
    assert plays[2] == pytest.approx(plays[1], abs=5e-3)


def test_files_are_those_recorded() -> None:
    sums = re.findall(r"^([0-9a-f]{64})  (\S+/\S+|\w+\.txt)$", (DATA / "PROVENANCE.md").read_text(), re.MULTILINE)
    files = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file() and p.name != "PROVENANCE.md"}
    assert {name for _, name in sums} == files
    for digest, name in sums:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 1_000_000


def test_both_shards_hold_targets_and_others() -> None:
    targets = {f"{module}.weight" for module in adapter()}
    shards = [set(load_file(file)) for file in sorted((DATA / "base").glob("*.safetensors"))]
    assert len(shards) == 2
    assert all(shard & targets and shard - targets for shard in shards)
    assert targets <= set().union(*shards)


def test_a_bf16_merge_retains_the_adapter() -> None:
    weights, _ = base()
    kept = whole = 0.0
    for module, (A, B, scaling) in adapter().items():
        delta = scaling * B.double() @ A.double()
        change = merged()[f"{module}.weight"].double() - weights[f"{module}.weight"].double()
        kept += (change * delta).sum().item()
        whole += delta.square().sum().item()
    assert kept / whole > 0.95


def test_loss_of_one_window_is_its_cross_entropy() -> None:
    weights, shape = base()
    text = b"And God said"
    rows = forward(weights, shape, torch.tensor([list(text)]))[0].double().log_softmax(-1)
    expected = -sum(rows[t, text[t + 1]].item() for t in range(len(text) - 1)) / (len(text) - 1)
    assert held_out_loss(weights, shape, text) == pytest.approx(expected, rel=1e-6)


def test_every_byte_but_the_first_counts_once() -> None:
    weights, shape = base()
    text = (DATA / "bible.txt").read_bytes()[: 2 * CONTEXT + 51]
    parts = [text[start : start + CONTEXT + 1] for start in (0, CONTEXT, 2 * CONTEXT)]
    sums = [held_out_loss(weights, shape, part) * (len(part) - 1) for part in parts]
    assert held_out_loss(weights, shape, text) == pytest.approx(math.fsum(sums) / (len(text) - 1), rel=1e-9)


def test_a_loss_of_one_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two bytes"):
        held_out_loss(*base(), b"A")


def test_generation_is_words_and_reproducible() -> None:
    weights, shape = base()
    known = set((DATA / "bible.txt").read_bytes().split())
    words = generate(weights, shape, b"And the LORD said unto ", 60).split()[:-1]
    assert sum(word in known for word in words) >= len(words) / 2
    drawn = [generate(weights, shape, b"And ", 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="prompt"):
        generate(weights, shape, b"", 1)


def test_greedy_generation_takes_the_likeliest_byte() -> None:
    weights, shape = base()
    text = b"In the beginning"
    for byte in generate(weights, shape, text, 5, adapter()):
        assert byte == forward(weights, shape, torch.tensor([list(text)]), adapter())[0, -1].argmax()
        text += bytes([byte])


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers the old way
@pytest.mark.parametrize("text", ["bible.txt", "plays.txt"])
def test_logits_equal_transformers_and_peft(text: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    weights, shape = base()
    ids = torch.tensor([list((DATA / text).read_bytes()[:CONTEXT])])
    model = transformers.LlamaForCausalLM.from_pretrained(DATA / "base", dtype=torch.float32)
    with torch.inference_mode():
        difference = (forward(weights, shape, ids) - model(input_ids=ids).logits).abs().max().item()
        assert difference < 1e-4
        tuned = peft.PeftModel.from_pretrained(model, DATA / "adapter")
        expected = tuned(input_ids=ids).logits
        assert (forward(weights, shape, ids, adapter()) - expected).abs().max().item() < 1e-4
        assert (forward(weights, shape, ids) - expected).abs().max().item() > 1  # the adapter does something


@pytest.mark.interop
def test_untied_and_ungrouped_models_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-3, rope_theta=500.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(256, (3, 70))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        logits = forward(model.state_dict(), LlamaShape.from_config(config.to_dict()), ids)
        assert (logits - model(input_ids=ids).logits).abs().max().item() < 1e-4


def test_adam_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    groups = [{"params": [ours[0]], "lr": 0.1}, {"params": [ours[1]], "lr": 0.01}]
    own = Adam(groups)
    peer = torch.optim.Adam([{"params": [theirs[0]], "lr": 0.1}, {"params": [theirs[1]], "lr": 0.01}])
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        own.step()
        peer.step()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(ours, theirs, strict=True))
    assert all(parameter.grad is None for parameter in ours)
