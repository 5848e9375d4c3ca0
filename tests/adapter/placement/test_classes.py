"""The table of what classes tie, against the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.adapter.placement.classes import MAJORS, model_class
from tests.make.tie_table import SAID, classes, described, names_of_classes

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = (
    "GPT2LMHeadModel", "GemmaForCausalLM", "OPTForCausalLM", "BertForMaskedLM", "WhisperForConditionalGeneration",
    "T5ForConditionalGeneration", "M2M100ForConditionalGeneration", "GPTNeoXForCausalLM",
    "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "BartModel",
)  # fmt: skip


def stated(inner: str | None, state: int, count: int) -> dict[str, Any]:
    """Return the config.json of a state of the table."""
    top, below = divmod(state, 3) if count == 9 else (state, 0)
    said = {} if SAID[top] is None else {"tie_word_embeddings": SAID[top]}
    return said if SAID[below] is None else said | {str(inner): {"tie_word_embeddings": SAID[below]}}


SHARES = 48


def compare(cls: Any) -> list[str]:
    """Return how the installed class differs from the table."""
    import transformers

    major = transformers.__version__.partition(".")[0]
    if major not in MAJORS:
        pytest.skip(f"the table has no transformers {major}")
    told, known = described(cls), model_class({"architectures": [cls.__name__]})
    if known is None:
        return [f"{cls.__name__}: not in the table"] if told["head"] or any(told["states"]) else []
    problems = []
    if told["head"] and known.key(told["head"]) != known.key(known.head or ""):
        problems.append(f"{cls.__name__}: head {told['head']}, in the table {known.head}")
    for state, groups in enumerate(told["states"]):
        tied = known.groups(stated(told["inner"], state, len(told["states"]))).get(major)
        if groups is not None and sorted(map(sorted, tied or ())) != groups:
            problems.append(f"{cls.__name__}, state {state}: ties {groups}, in the table {tied}")
    return problems


@pytest.mark.parametrize("name", FEW)
def test_what_a_class_ties(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert compare(getattr(transformers, name)) == []


@pytest.mark.sweep(2)
@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_what_every_class_ties(share: int) -> None:
    """A class that its default config does not build is compared where it can be built. Every class is of one share."""
    pytest.importorskip("transformers")
    problems, built = [], 0
    for cls in classes(names_of_classes()[share::SHARES]):
        try:
            problems += compare(cls)
            built += 1
        except Exception:
            continue
    assert built > 500 / SHARES * 0.8
    assert problems == []


def test_a_model_type_without_a_class_is_that_of_its_head() -> None:
    found = model_class({"model_type": "whisper"})
    assert found is not None
    assert (found.name, found.head) == ("WhisperForConditionalGeneration", "proj_out.weight")
    assert model_class({"model_type": "no_such"}) is model_class({}) is model_class({"architectures": ["Ours"]}) is None


def test_flags_are_written_at_every_level_that_is_read() -> None:
    found = model_class({"architectures": ["Gemma3ForConditionalGeneration"]})
    assert found is not None
    flag = {"tie_word_embeddings": False}
    assert found.untied({"text_config": {"vocab_size": 8}}) == {**flag, "text_config": {"vocab_size": 8, **flag}}
    assert found.untied({}) == {**flag, "text_config": flag}
    gpt2 = model_class({"architectures": ["GPT2LMHeadModel"]})
    assert gpt2 is not None
    assert gpt2.untied({}) == flag
