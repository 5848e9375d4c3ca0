"""What becomes of a tied head, by policy; the numbers are in tests/interop/test_bases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.adapter.placement.tied import apply_policy
from loratools.errors import IncompatibleAdapter
from loratools.storage.header import read_header
from tests.adapter.placement.placing import adapter

EMBEDDING = {"model.embed_tokens.weight": (16, 4), "model.layers.0.q_proj.weight": (4, 4)}
HEAD = {**EMBEDDING, "lm_head.weight": (16, 4)}
ON_HEAD = adapter({"lm_head": (16, 4), "model.layers.0.q_proj": (4, 4)})
ELSEWHERE = adapter({"model.layers.0.q_proj": (4, 4)})


@pytest.mark.parametrize("policy", ["error", "untie", "both"])
@pytest.mark.parametrize(
    ("given", "tensors", "config"),
    [
        (ELSEWHERE, EMBEDDING, {"tie_word_embeddings": True}),
        (ON_HEAD, HEAD, {"tie_word_embeddings": False}),
        (ON_HEAD, HEAD, {}),
    ],
)
def test_nothing_to_decide(given: Any, tensors: Any, config: Any, policy: str) -> None:
    untied = apply_policy((given,), tensors, config, policy)
    assert (untied.adapters, untied.copies, untied.config) == ((given,), {}, {})


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_error_lists_what_shares(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleAdapter, match=r"model\.embed_tokens\.weight") as refusal:
        apply_policy((ON_HEAD, adapter({"model.embed_tokens": (16, 4)})), EMBEDDING, config, "error")
    assert refusal.value.problems == ("lm_head: shares its weight", "model.embed_tokens: shares its weight")
    assert "--tied untie" in str(refusal.value.hint)


def test_untie_adds_a_head_and_takes_the_tie_away() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "vocab_size": 16}}
    untied = apply_policy((ON_HEAD,), EMBEDDING, config, "untie")
    assert untied.copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.config == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "vocab_size": 16},
    }


SILENT = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}


@pytest.mark.parametrize("on", ["lm_head", "model.embed_tokens"])
def test_where_both_are_stored_and_the_config_is_silent_it_is_asked(on: str) -> None:
    """The class decides, and some load one of the two for both."""
    given = adapter({on: (16, 4)})
    with pytest.raises(IncompatibleAdapter, match="does not say whether they are tied") as refusal:
        apply_policy((given,), HEAD, SILENT, "error")
    assert "--tied untie" in str(refusal.value.hint)
    untied = apply_policy((given,), HEAD, SILENT, "untie")
    assert (untied.adapters, untied.copies, untied.config) == ((given,), {}, {"tie_word_embeddings": False})
    assert apply_policy((ELSEWHERE,), HEAD, SILENT, "error").config == {}


@pytest.mark.parametrize(
    ("architecture", "embedding", "head"),
    [
        ("WhisperForConditionalGeneration", "model.decoder.embed_tokens", "proj_out"),
        ("GPTNeoXForCausalLM", "gpt_neox.embed_in", "embed_out"),
        ("GPT2LMHeadModel", "transformer.wte", "lm_head"),
        ("XLMWithLMHeadModel", "transformer.embeddings", "pred_layer.proj"),
        ("DistilBertForMaskedLM", "distilbert.embeddings.word_embeddings", "vocab_projector"),
        ("GemmaForCausalLM", "model.tok_embeddings", "lm_head"),  # the file's own name for the embedding
    ],
)
def test_the_head_gets_the_name_that_its_class_reads(architecture: str, embedding: str, head: str) -> None:
    config = {"tie_word_embeddings": True, "architectures": [architecture]}
    for changed in (embedding, head):
        tensors = {f"{embedding}.weight": (16, 4)}
        if (architecture, changed) == ("GPTNeoXForCausalLM", head):
            changed = "lm_head"  # as transformers 5 renamed it
        untied = apply_policy((adapter({changed: (16, 4)}),), tensors, config, "untie")
        assert untied.copies == {f"{head}.weight": f"{embedding}.weight"}
        assert list(untied.adapters[0].updates) == [changed]


@pytest.mark.parametrize(
    ("embedding", "changed", "architecture", "reason"),
    [
        ("model.embed_tokens", "model.embed_tokens", "OursForMaskedLM", "what OursForMaskedLM calls its head is not"),
        ("model.shared", "model.shared", "M2M100ForConditionalGeneration", "transformers 4 keeps .* one weight"),
        ("model.shared", "model.encoder.embed_tokens", "BartForConditionalGeneration", "transformers 4 keeps"),
        ("shared", "lm_head", "T5ForConditionalGeneration", r"scales the input of its head by d_model\*\*-0.5"),
        ("wte", "lm_head", "GPT2LMHeadModel", "names its tensors without 'transformer'"),
    ],
)
def test_what_no_output_can_say_is_refused(embedding: str, changed: str, architecture: str, reason: str) -> None:
    tensors, config = {f"{embedding}.weight": (16, 4)}, {"architectures": [architecture]}
    with pytest.raises(IncompatibleAdapter, match=reason):
        apply_policy((adapter({changed: (16, 4)}),), tensors, config, "untie")


def test_every_name_of_an_encoder_decoder_is_stored_when_its_head_is_untied() -> None:
    """transformers 5 lets go of all of them at once."""
    config = {"architectures": ["M2M100ForConditionalGeneration"]}
    untied = apply_policy((adapter({"lm_head": (16, 4)}),), {"model.shared.weight": (16, 4)}, config, "untie")
    names = ("lm_head", "model.decoder.embed_tokens", "model.encoder.embed_tokens")
    assert untied.copies == dict.fromkeys((f"{name}.weight" for name in names), "model.shared.weight")


def test_a_bias_of_the_head_is_stored_under_both_names() -> None:
    tensors = {"bert.embeddings.word_embeddings.weight": (16, 4), "cls.predictions.bias": (16,)}
    config = {"architectures": ["BertForMaskedLM"]}
    untied = apply_policy((adapter({"cls.predictions.decoder": (16, 4)}),), tensors, config, "untie")
    assert untied.copies == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def test_a_class_that_never_ties_by_default_is_not_asked_about() -> None:
    tensors = {"gpt_neox.embed_in.weight": (16, 4), "embed_out.weight": (16, 4)}
    given = adapter({"embed_out": (16, 4)})
    assert apply_policy((given,), tensors, {"architectures": ["GPTNeoXForCausalLM"]}, "error").adapters == (given,)


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),  # 4 ties, 5 does not
        ({"text_config": {}}, False),  # both tie by default
    ],
)
def test_both_says_so_where_versions_read_the_config_otherwise(config: dict[str, Any], written: bool) -> None:
    config["architectures"] = ["Gemma3ForConditionalGeneration"]
    tensors = {"model.language_model.embed_tokens.weight": (16, 4)}
    fields = apply_policy((adapter({"lm_head": (16, 4)}),), tensors, config, "both").config
    said = {"tie_word_embeddings": True}
    assert fields == ({**said, "text_config": said} if written else {})


def test_the_inner_config_says_it_too() -> None:
    """transformers 4 reads text_config, transformers 5 the outer one."""
    config = {"tie_word_embeddings": True, "text_config": {"vocab_size": 16}}
    inner = apply_policy((ON_HEAD,), EMBEDDING, config, "untie").config["text_config"]
    assert inner == {"vocab_size": 16, "tie_word_embeddings": False}


def test_untie_uses_a_stored_head() -> None:
    """Some savers write the tied weight twice; then nothing is added."""
    untied = apply_policy((ON_HEAD,), HEAD, {"tie_word_embeddings": True}, "untie")
    assert (untied.copies, untied.config) == ({}, {"tie_word_embeddings": False})


def test_both_moves_the_head_onto_the_embedding() -> None:
    untied = apply_policy((ON_HEAD,), EMBEDDING, {}, "both")
    assert list(untied.adapters[0].updates) == ["model.embed_tokens", "model.layers.0.q_proj"]


def test_both_changes_every_copy_of_the_weight(tmp_path: Path) -> None:
    """Some savers write the tied weight twice; other numbers are no copy."""
    config = {"tie_word_embeddings": True}
    W = np.ones((16, 4), np.float32)
    for head, refused in ((W, False), (2 * W, True)):
        save_file({"model.embed_tokens.weight": W, "lm_head.weight": head}, tmp_path / "model.safetensors")
        tensors = read_header(tmp_path / "model.safetensors").tensors
        if refused:
            with pytest.raises(IncompatibleAdapter, match="no one weight to change"):
                apply_policy((ON_HEAD,), tensors, config, "both")
        else:
            updates = apply_policy((ON_HEAD,), tensors, config, "both").adapters[0].updates
            assert updates["lm_head"] is updates["model.embed_tokens"]


def test_both_with_updates_of_head_and_embedding() -> None:
    """Two changes of one adapter for one weight have no common place; neither may be dropped."""
    both = adapter({"lm_head": (16, 4), "model.embed_tokens": (16, 4)})
    with pytest.raises(IncompatibleAdapter, match="head and its embedding"):
        apply_policy((both,), EMBEDDING, {}, "both")


def test_embeddings_of_side_towers_are_not_the_main_one() -> None:
    tensors = {"model.audio_tower.decoder.embed_tokens.weight": (9, 4), **EMBEDDING}
    untied = apply_policy((ON_HEAD,), tensors, {}, "untie")
    assert untied.copies == {"lm_head.weight": "model.embed_tokens.weight"}


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="unknown policy 'keep'"):
        apply_policy((ON_HEAD,), EMBEDDING, {}, "keep")
