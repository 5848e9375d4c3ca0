"""What is a reference to the Hub, and what is not."""

import pytest

from loratools.errors import BadFile
from loratools.hub.refs import Ref, is_plain, parse
from loratools.storage.sources import is_reference


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("hf://org/name", Ref("org/name")),
        ("org/name", Ref("org/name")),
        ("hf://models/org/name", Ref("org/name")),
        ("hf://org/na.me-1_x/", Ref("org/na.me-1_x")),
        ("hf://org/name@main", Ref("org/name", "main")),
        ("hf://org/name@v1.0/sub/file.safetensors", Ref("org/name", "v1.0", "sub/file.safetensors")),
        ("hf://org/name/file@2x.safetensors", Ref("org/name", None, "file@2x.safetensors")),
        ("hf://org/name@refs/pr/12", Ref("org/name", "refs/pr/12")),
        ("hf://org/name@refs/pr/12/a/b.json", Ref("org/name", "refs/pr/12", "a/b.json")),
        ("hf://org/name@refs%2Fpr%2F1/a", Ref("org/name", "refs/pr/1", "a")),
        ("hf://org/name@feature%2Fx", Ref("org/name", "feature/x")),
    ],
)
def test_parse(text: str, ref: Ref) -> None:
    assert parse(text) == ref
    if "%" not in text:
        assert parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://name", "hf://datasets/org/name", "hf://spaces/org/name", "https://huggingface.co/org/name",
        "hf://org/name/../../etc", "hf://org/name/a//b", "hf:///name", "hf://org/", "/org/name", "../name", "hf://-a/b",
        "hf://org/name@", "hf://org/name/a\\b", "hf://o rg/name",
    ],
)  # fmt: skip
def test_what_is_not_a_model(text: str) -> None:
    with pytest.raises(BadFile, match="is not a"):
        parse(text)


def test_only_texts_with_the_scheme_are_references() -> None:
    from pathlib import Path

    assert is_reference("hf://org/name")
    assert not is_reference("org/name")
    assert not is_reference(Path("hf://org/name"))


@pytest.mark.parametrize("path", ["../a", "a/../b", "/a", "a//b", "", ".", "a\\b", "c:x", "a\0", "a\nb", "a/"])
def test_paths_that_must_not_be_written(path: str) -> None:
    assert not is_plain(path)
