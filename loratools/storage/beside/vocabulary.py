"""How many tokens a tokenizer has, from its files: the largest id and one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools.decisions import decided

MAX_FILE = 100_000_000
"""Bytes of a file that is read for it; the largest tokenizers have forty million."""


def tokens(files: Mapping[str, Path]) -> int:
    """Return how many ids a tokenizer can produce: one more than the largest; 0 where no file tells.

    `files` are those of a model by their names in its folder, whichever folder each comes from. A file that has not the
    layout that its name promises tells nothing: what is wrong with it is for loaders to say.
    """
    largest = -1
    for name, ids in _READERS.items():
        if name in files:
            try:
                if files[name].stat().st_size > MAX_FILE:
                    raise ValueError("too large")
                largest = max(largest, *ids(files[name]), -1)
            except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError):
                decided("%s: its tokens cannot be counted: not a %s as loaders read it", files[name], name)
    return largest + 1


def _of_fast(path: Path) -> Iterator[int]:
    document = _json(path)
    yield from (int(token["id"]) for token in document.get("added_tokens") or ())
    vocabulary = document["model"]["vocab"]
    yield max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1


def _of_config(path: Path) -> Iterator[int]:
    yield from map(int, _json(path).get("added_tokens_decoder") or ())


def _of_map(path: Path) -> Iterator[int]:
    yield max((int(number) for number in _json(path).values()), default=-1)


def _of_lines(path: Path) -> Iterator[int]:
    yield len(path.read_bytes().splitlines()) - 1


def _of_tekken(path: Path) -> Iterator[int]:
    yield int(_json(path)["config"]["default_vocab_size"]) - 1


def _of_sentencepiece(path: Path) -> Iterator[int]:
    """Count the pieces: field 1 of the message, each after its length."""
    data, at, pieces = path.read_bytes(), 0, 0
    while at < len(data):
        if data[at] != 0x0A:
            break
        length, at = _varint(data, at + 1)
        at += length
        pieces += 1
    yield pieces - 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _json(path: Path) -> dict[str, Any]:
    # Plainly: the tokenizers of large vocabularies have tens of megabytes.
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


_READERS: Mapping[str, Callable[[Path], Iterator[int]]] = {
    "tokenizer.json": _of_fast, "tokenizer_config.json": _of_config, "added_tokens.json": _of_map,
    "vocab.json": _of_map, "vocab.txt": _of_lines, "tekken.json": _of_tekken, "tokenizer.model": _of_sentencepiece,
    "spiece.model": _of_sentencepiece,
}  # fmt: skip
