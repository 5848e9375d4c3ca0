"""Comparing two identities of a base: for each tier every combination of known, unknown, equal and different."""

from __future__ import annotations

from itertools import product

import pytest

from loratools.adapter.identity import Comparison, compare, is_on_hub, one_name, same_name
from loratools.adapter.model import BaseIdentity
from loratools.errors import BadFile

ONE, OTHER = "blake3:" + "1" * 64, "blake3:" + "2" * 64
SHA = "sha256:" + "1" * 64

STATES = {
    "neither": (None, None, None),
    "first alone": (ONE, None, "unknown"),
    "second alone": (None, ONE, "unknown"),
    "equal": (ONE, ONE, "agreeing"),
    "different": (ONE, OTHER, "differing"),
    "other algorithm": (ONE, SHA, "unknown"),
}
"""What two identities state of one tier: the digests of both, and the list in which the pair belongs."""


def identity(schema: str | None, tensor: str | None, root: str | None, name: str | None = None) -> BaseIdentity:
    return BaseIdentity(name, None, schema, {"a.weight": tensor} if tensor else {}, root)


def listed(comparison: Comparison) -> dict[str, str]:
    return {pair.tier: group for group in ("agreeing", "differing", "unknown") for pair in getattr(comparison, group)}


@pytest.mark.parametrize(("schema", "tensor", "root"), list(product(STATES, repeat=3)))
def test_every_combination_of_tiers(schema: str, tensor: str, root: str) -> None:
    states = {"schema": STATES[schema], "tensors": STATES[tensor], "root": STATES[root]}
    first, second = (identity(*(state[side] for state in states.values())) for side in (0, 1))
    comparison = compare(first, second)
    assert listed(comparison) == {tier: group for tier, (_, _, group) in states.items() if group}
    assert comparison.by_name is None
    assert listed(compare(second, first)) == listed(comparison)


@pytest.mark.parametrize(("state", "group"), [(name, STATES[name][2]) for name in STATES])
def test_a_complete_list_of_tensors_has_no_unknown_ones(state: str, group: str | None) -> None:
    first, second, _ = STATES[state]
    comparison = compare(identity(None, first, None), identity(None, second, None), complete=True)
    wanted = "differing" if state == "first alone" else group
    assert listed(comparison) == ({"tensors": wanted} if wanted else {})


@pytest.mark.parametrize(
    ("first", "second", "by_name"),
    [(None, None, None), ("org/base", None, None), (None, "org/base", None), ("org/base", "org/base", True),
     ("org/base", "org/other", False)],
)  # fmt: skip
def test_names_are_compared_apart_from_digests(first: str | None, second: str | None, by_name: bool | None) -> None:
    comparison = compare(identity(ONE, None, None, first), identity(ONE, None, None, second))
    assert comparison.by_name is by_name
    assert listed(comparison) == {"schema": "agreeing"}


def test_tensors_are_paired_by_name() -> None:
    first = BaseIdentity(tensors={"a": ONE, "b": ONE, "c": ONE})
    second = BaseIdentity(tensors={"b": ONE, "c": OTHER, "d": ONE})
    comparison = compare(first, second)
    assert [pair.name for pair in comparison.agreeing] == ["b"]
    assert [(pair.name, pair.first, pair.second) for pair in comparison.differing] == [("c", ONE, OTHER)]
    assert [pair.name for pair in comparison.unknown] == ["a", "d"]
    assert [pair.name for pair in compare(first, second, complete=True).differing] == ["a", "c"]


def test_what_is_no_digest_is_told() -> None:
    with pytest.raises(BadFile, match="is not a digest"):
        compare(BaseIdentity(schema="md5:1"), BaseIdentity(schema=ONE))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("gpt2", "gpt2", True), ("gpt2", "llama", False), ("gpt2", None, None), (None, "llama", None), (None, None, None)],
)
def test_model_types_are_no_digest(first: str | None, second: str | None, expected: bool | None) -> None:
    comparison = compare(BaseIdentity(model_type=first), BaseIdentity(model_type=second))
    assert comparison.by_type is expected
    assert listed(comparison) == {}


HUB = "org/Base-7B"
SPELLINGS = (
    HUB, "hf://org/Base-7B", "hf://org/base-7b@main", "https://huggingface.co/org/Base-7B", "org/Base-7B/",
    "https://huggingface.co/org/Base-7B/tree/main", "https://hf.co/org/Base-7B",
    "/root/.cache/huggingface/hub/models--org--Base-7B/snapshots/0123abc", "/mnt/models--org--Base-7B",
)  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_a_name_on_the_hub_is_one_in_every_spelling(spelled: str) -> None:
    for other in SPELLINGS:
        assert same_name(spelled, other) is True
    assert is_on_hub(spelled)
    assert same_name(spelled, "org/Base-8B") is False
    assert same_name(spelled, "other/Base-7B") is False
    for folder in ("/models/Base-7B", "./Base-7B", "~/Base-7B", r"C:\models\Base-7B", "file:///models/Base-7B"):
        assert same_name(spelled, folder) is same_name(folder, spelled) is None
        assert not is_on_hub(folder)
    assert same_name(spelled, "/models/Base-8B") is False


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("base", "base", True), ("./base", "base", True), ("/models/base/", "/models/base", True),
     ("/models/base", "base", None), ("/models/base", "/mnt/base", None), (r"D:\base", "base", None),
     ("/models/Base", "/models/base", None), ("gpt2", "openai-community/gpt2", None), ("gpt2", "gpt2-medium", False),
     ("/models/one", "/models/two", False)],
)  # fmt: skip
def test_of_folders_the_last_part_is_compared(first: str, second: str, expected: bool | None) -> None:
    assert same_name(first, second) is same_name(second, first) is expected
    assert compare(BaseIdentity(first), BaseIdentity(second)).by_name is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["/models/base", "hf://org/base", "base"], "hf://org/base"), (["/models/base", "base"], "base"),
     (["org/base", "org/other"], None), (["org/base", "/models/other"], None), ([], None), (["gpt2", "gpt2"], "gpt2")],
)  # fmt: skip
def test_one_name_of_several(names: list[str], expected: str | None) -> None:
    assert one_name(names) == one_name(names[::-1]) == expected
