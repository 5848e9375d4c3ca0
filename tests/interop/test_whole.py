"""Tensors that PEFT trains whole, merged on disk: heads, vocabularies, token rows, copies of the base; config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.surgery.merge import merge
from tests.interop.models import FAMILIES, V, load
from tests.interop.test_kinds import against_peft, difference, train

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json."""
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def saved(family: str, folder: Path, **changes: Any) -> Any:
    """Build a model, save it, and return it as it is read back, so that PEFT knows where it lies."""
    model = FAMILIES[family].build(**changes)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("base_class", ["LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel", "BertModel"])
@pytest.mark.parametrize("brings_config", [True, False], ids=["own-config", "task-type"])
def test_a_new_head(base_class: str, brings_config: bool, tmp_path: Path) -> None:
    """The result loads as a classifier and is what PEFT merges, also where the config names no saved module."""
    import transformers

    family = {"L": "llama", "G": "gpt2", "B": "bert"}[base_class[0]]
    settings = {"pad_token_id": 0}
    config = getattr(transformers, FAMILIES[family].config)(**{**FAMILIES[family].settings, **settings})
    torch.manual_seed(0)
    getattr(transformers, base_class)(config).save_pretrained(tmp_path / "base")
    labels = {0: "no", 1: "maybe", 2: "yes"} if brings_config else {i: f"LABEL_{i}" for i in range(3)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label=labels, label2id={label: i for i, label in labels.items()}
    )
    peft = train(model, target_modules=list(FAMILIES[family].targets), task_type="SEQ_CLS")
    peft.save_pretrained(tmp_path / "adapter")
    stated = tmp_path / "adapter" / "adapter_config.json"
    stated.write_text(json.dumps({**json.loads(stated.read_text()), "modules_to_save": None}))
    if brings_config:
        model.config.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    theirs = peft.merge_and_unload().eval()
    assert type(ours) is type(theirs)
    assert ours.config.id2label == labels
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    (account,) = report.consumed
    assert account.tensors == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert (account.replaced, account.passed_over) == (2 if family == "bert" else 1, 0)
    assert any(note.startswith("added to the model: ") for note in report.notes)


@pytest.mark.parametrize("rows", [V + 6, V - 5], ids=["grown", "shrunk"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=["whole", "lora"])
def test_a_resized_vocabulary(rows: int, tied: bool, targets: list[str], tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base", tie_word_embeddings=tied)
    base.resize_token_embeddings(rows)
    if tied and len(targets) > 1:
        targets = targets[:2]  # a head of its own would untie; that is another test
    peft = train(base, target_modules=targets)
    peft.save_pretrained(tmp_path / "adapter")
    if tied and len(targets) > 1:
        with pytest.raises(IncompatibleAdapter, match="ties its output head"):
            merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    policy = "both" if tied and len(targets) > 1 else "error"
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path, tied=policy)
    assert worst <= 1e-6
    assert config_of(tmp_path / "ours")["vocab_size"] == rows
    reloaded = type(base).from_pretrained(tmp_path / "ours")
    assert reloaded.get_input_embeddings().weight.shape[0] == reloaded.get_output_embeddings().weight.shape[0] == rows
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied
    assert report.tensors == len(load(tmp_path / "base"))


def test_an_embedding_without_its_head(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    base.resize_token_embeddings(V + 6)
    train(base, target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleAdapter, match="brings only one of embedding and output head") as raised:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    assert raised.value.problems == (
        "model.embed_tokens.weight: 70 rows after the merge",
        "lm_head.weight: 64 rows after the merge",
    )


@pytest.mark.parametrize(
    ("tied", "stated", "changed"),
    [
        (False, [5, 2, 63], 1),
        (False, {"embed_tokens": [5, 2], "lm_head": [9]}, 2),
        (True, [5, 2, 63], 1),
        (True, {"embed_tokens": [7]}, 1),
    ],
    ids=["untied", "both", "tied", "tied-by-name"],
)
def test_rows_of_single_tokens(tied: bool, stated: Any, changed: int, tmp_path: Path) -> None:
    """In a tied model the head follows, so there is nothing to decide."""
    base = saved("llama", tmp_path / "base", tie_word_embeddings=tied)
    peft = train(base, target_modules=["q_proj"], trainable_token_indices=stated)
    peft.save_pretrained(tmp_path / "adapter")
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert worst <= 1e-6
    assert report.changed == 2 + changed
    merged, before = load(tmp_path / "ours"), load(tmp_path / "base")
    rows = (merged["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert rows.tolist() == sorted(stated if isinstance(stated, list) else stated["embed_tokens"])


def test_rows_in_a_resized_vocabulary(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    base.resize_token_embeddings(V + 6)
    train(base, target_modules=["q_proj"], trainable_token_indices=[V, V + 5]).save_pretrained(tmp_path / "adapter")
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert worst <= 1e-6
    assert config_of(tmp_path / "ours")["vocab_size"] == V + 6
    assert report.consumed[0].replaced == 2


def test_rows_that_two_adapters_replace(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    for name, rows in (("a", [1, 2]), ("b", [2, 3]), ("c", [3, 4])):
        train(base, target_modules=["q_proj"], trainable_token_indices=rows).save_pretrained(tmp_path / name)
    with pytest.raises(IncompatibleAdapter) as raised:
        merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    assert raised.value.problems == ("model.embed_tokens: row 2 is replaced by more than one adapter",)
    with pytest.raises(IncompatibleAdapter, match="cannot be merged together"):
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "ours", weights=[0.5])
    merge(tmp_path / "base", [tmp_path / "a", tmp_path / "c"], tmp_path / "ours")
    changed = (
        load(tmp_path / "ours")["model.embed_tokens.weight"] != load(tmp_path / "base")["model.embed_tokens.weight"]
    )
    assert changed.any(1).nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_copies_of_the_base_are_compared_and_never_added(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    peft = train(base, target_modules=["embed_tokens", "lm_head"])
    peft.save_pretrained(tmp_path / "adapter")
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert worst <= 1e-6
    assert (report.consumed[0].applied, report.consumed[0].passed_over) == (4, 2)


def test_a_copy_of_another_base(tmp_path: Path) -> None:
    """A wrong base is told; with --check-base warn the copy takes its place, as PEFT lets it."""
    base = saved("llama", tmp_path / "base")
    train(base, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WrongBase) as raised:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    assert raised.value.problems == (
        "adapter 1: its copy of model.embed_tokens.weight is another tensor than the base's",
    )
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path, check_base="warn")
    assert worst <= 1e-6
    assert any("takes the place of the base's, as in PEFT" in note for note in report.notes)


def test_a_half_precision_copy_is_a_copy(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    train(base, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].bfloat16()}, file, {"format": "pt"})
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    assert report.consumed[0].passed_over == 1


def test_a_new_head_takes_the_dtype_of_the_model(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    train(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    head = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    save_file({**load_file(file), "base_model.model.score.weight": head}, file, {"format": "pt"})
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours", max_shard_size=20_000)
    assert torch.equal(load(tmp_path / "ours")["score.weight"], head.bfloat16())
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert "score.weight" in index["weight_map"]
    assert any("config.json says nothing of score.weight" in note for note in report.notes)


@pytest.mark.parametrize("policy", ["untie", "both"])
def test_a_head_that_is_saved_whole_in_a_tied_model(policy: str, tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base", tie_word_embeddings=True)
    train(base, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleAdapter, match="ties its output head"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours", tied=policy)
    head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    merged, before = load(tmp_path / "ours"), load(tmp_path / "base")
    if policy == "untie":
        assert torch.equal(merged["lm_head.weight"], head)
        assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    else:
        assert "lm_head.weight" not in merged
        assert torch.equal(merged["model.embed_tokens.weight"], head)
    assert config_of(tmp_path / "ours")["tie_word_embeddings"] == (policy == "both")


def test_a_vocabulary_and_a_tie_under_text_config(tmp_path: Path) -> None:
    base = saved("gemma3-vl", tmp_path / "base")
    base.resize_token_embeddings(V + 8)
    peft = train(base, target_modules=["q_proj"])
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    assert config_of(tmp_path / "ours")["text_config"]["vocab_size"] == V + 8
    again = type(base).from_pretrained(tmp_path / "ours")
    assert difference(again.get_input_embeddings().weight, base.get_input_embeddings().weight) == 0
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
