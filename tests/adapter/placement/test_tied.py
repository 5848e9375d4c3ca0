"""What becomes of a tied head, by policy; the numbers are in tests/interop/test_bases.py."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.adapter.placement.tied import apply_policy
from loratools.errors import IncompatibleAdapter
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


SILENT = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}


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
    ("architecture", "head"),
    [
        ("WhisperForConditionalGeneration", "proj_out"),
        ("GPTNeoXForCausalLM", "embed_out"),
        ("GPT2LMHeadModel", "lm_head"),
    ],
)
def test_the_head_gets_the_name_that_its_class_reads(architecture: str, head: str) -> None:
    config = {"tie_word_embeddings": True, "architectures": [architecture]}
    untied = apply_policy((adapter({"model.embed_tokens": (16, 4)}),), EMBEDDING, config, "untie")
    assert untied.copies == {f"{head}.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("tensors", "architecture", "reason"),
    [
        (EMBEDDING, "BertForMaskedLM", "what BertForMaskedLM calls its head is not known"),
        ({"model.shared.weight": (16, 4)}, "M2M100ForConditionalGeneration", "encoder and decoder as well"),
    ],
)
def test_a_head_that_cannot_be_untied_is_refused(tensors: Any, architecture: str, reason: str) -> None:
    config, embedding = {"architectures": [architecture]}, next(iter(tensors))
    with pytest.raises(IncompatibleAdapter, match=reason):
        apply_policy((adapter({embedding.removesuffix(".weight"): (16, 4)}),), tensors, config, "untie")


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
    with pytest.raises(IncompatibleAdapter, match="no one weight to change"):
        apply_policy((ON_HEAD,), HEAD, {"tie_word_embeddings": True}, "both")


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
