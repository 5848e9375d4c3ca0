"""YAML of strangers is names and plain values, whatever it tries."""

from __future__ import annotations

import pytest

from loratools.errors import BadFile
from loratools.storage.beside.plain_yaml import MAX_YAML, parse_yaml


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("", None),
        ("a: 1\nb: [x, 2.5, null, true]\nc:\n  d: 'text'\n", {"a": 1, "b": ["x", 2.5, None, True], "c": {"d": "text"}}),
        ("1: one\n2026: year\n", {1: "one", 2026: "year"}),
        ("? [1, 2]\n: x\n", "is not plain YAML"),
        ("a: 1:59\n", {"a": 119}),
        (f"a: '{'1:59' * 99}'\n", {"a": "1:59" * 99}),
        (f"a: {'long text ' * 99}\n", {"a": ("long text " * 99).strip()}),
        (f"{'long_name' * 99}: 1\n", {"long_name" * 99: 1}),
        ("a: &x [1]\nb: *x\n", "has aliases"),
        ("<<: &x {a: 1}\n", {"a": 1}),
        ("a: " + "[" * 65, "is nested more than 64 deep"),
        ("a: !!python/name:os.system x\n", "is not plain YAML"),
        ("- 1\n", "is not names and values"),
        ("a: {", "is not plain YAML"),
        ("a: \x00", "is not plain YAML"),
        ("a: 1" + ":59" * 40, "has a number of 121 characters$"),
        ("a: " + "9" * 101, "has a number of 101 characters$"),
        ("a: {b: [{" + "9" * 16 + ": 1}]}", "has a number of 16 characters as a name"),
        ("a: 1\n" + f"{(2**61 - 1) * 3}: 1\n", "has a number of 19 characters as a name"),
        ("a: " + "x" * MAX_YAML, "is larger than 1000000 bytes"),
    ],
)
def test_documents(text: str, document: object) -> None:
    if isinstance(document, str):
        with pytest.raises(BadFile, match=f"^x.yaml: it {document}"):
            parse_yaml(text, "x.yaml: it")
    else:
        assert parse_yaml(text, "x.yaml: it") == document
