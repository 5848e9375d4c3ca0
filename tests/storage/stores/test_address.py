"""Where a reference leads, and that nothing secret of it is shown."""

from __future__ import annotations

import pytest

from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.storage.stores import address


@pytest.mark.parametrize(
    ("reference", "root", "key", "text"),
    [
        ("s3://bucket/models/llama/", "s3://bucket", "models/llama", "s3://bucket/models/llama"),
        ("gs://bucket", "gs://bucket", "", "gs://bucket"),
        ("az://container/a b/c?d", "az://container", "a b/c?d", "az://container/a b/c?d"),
        ("https://host:8443/a%20b/x.safetensors", "https://host:8443/", "a b/x.safetensors", None),
        ("http://127.0.0.1:80/x", "http://127.0.0.1:80/", "x", None),
        ("http://localhost/x", "http://localhost/", "x", None),
    ],
)
def test_references(reference: str, root: str, key: str, text: str | None) -> None:
    found = address.parse(reference)
    assert (found.root, found.key) == (root, key)
    assert text is None or str(found) == text


def test_who_asks_and_what_is_signed_goes_to_the_server_and_nowhere_else() -> None:
    found = address.parse("https://me:word@host/model/x.safetensors?X-Amz-Signature=abc#part")
    assert found.root == "https://me:word@host/?X-Amz-Signature=abc"
    assert str(found) == "https://host/model/x.safetensors"
    assert str(found.at("other")) == "https://host/other"
    told = address.shown("GET https://me:word@host/model?X-Amz-Signature=abc failed at s3://k:s@b/x")
    assert told == "GET https://host/model failed at s3://b/x"


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ("s3://", BadFile, "expected s3://BUCKET/KEY"),
        ("s3:///key", BadFile, "expected s3://BUCKET/KEY"),
        ("s3://bucket/a/../../b", BadFile, "is not a path inside a store"),
        ("s3://bucket/a//b", BadFile, "is not a path inside a store"),
        ("https://host/a%2e%2e/%2e%2e/b", BadFile, "is not a path inside a store"),
        ("https://host/a%00b", BadFile, "is not a path inside a store"),
        ("https://[::1/x", BadFile, "not an address"),
        ("http://example.org/x", InvalidOption, "http:// lets everyone on the way read and change what is fetched"),
        ("http://me:word@127.0.0.1.example.org/x", InvalidOption, "http:// lets everyone"),
        ("https://huggingface.co/org/name/tree/main", BadFile, "a page of the Hub"),
    ],
)
def test_what_is_none_is_said(reference: str, error: type[LoraToolsError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        address.parse(reference)
    assert "word" not in str(caught.value)
