"""How many ids a tokenizer has, from each file that tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.storage.beside.vocabulary import tokens


def pieces(count: int) -> bytes:
    """The beginning of a SentencePiece model: field 1 of the message once for each piece, then field 2."""
    piece = b"\x0a\x05piece\x15\x00\x00\x00\x00"
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for _ in range(count)) + b"\x12\x02\x08\x01"


FILES = {
    "tokenizer.json": (json.dumps({"model": {"vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 4}]}).encode(), 7),
    "vocab.json": (b'{"a": 0, "b": 4}', 5),
    "added_tokens.json": (b'{"<x>": 11}', 12),
    "tokenizer_config.json": (json.dumps({"added_tokens_decoder": {"3": {}, "8": {}}}).encode(), 9),
    "vocab.txt": (b"a\nb\nc\n", 3),
    "tokenizer.model": (pieces(10), 10),
    "spiece.model": (pieces(300), 300),
    "tekken.json": (b'{"config": {"default_vocab_size": 131072}}', 131072),
}


@pytest.mark.parametrize("name", FILES)
def test_each_file(name: str, tmp_path: Path) -> None:
    content, count = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert tokens({name: tmp_path / name}) == count


def test_the_largest_of_all_counts(tmp_path: Path) -> None:
    paths = {}
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        paths[name] = tmp_path / name
        paths[name].write_bytes(FILES[name][0])
    assert tokens(paths) == 12
    assert tokens({}) == 0


def test_unigram_has_a_list(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 5}]}))
    assert tokens({"tokenizer.json": path}) == 6


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{", b'{"model": "x"}', b"\x0a", b"\x0a\xff", b"null"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_tell_nothing(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert tokens({name: tmp_path / name}) <= len(content)
