"""Documents with very many numbers, such as the cosine of every two of a thousand adapters: printed piece by piece."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loratools.cli._show import plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TOGETHER = 1 << 14  # parts of a document that are written at once


def encoded(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `encode` returns in pieces, each with whole strings of the document: a text of any length."""
    growing: list[str] = []
    for piece in json.JSONEncoder(indent=2, allow_nan=False).iterencode(plain(document)):
        growing.append(piece)
        if len(growing) >= _TOGETHER:
            yield "".join(growing)
            growing = []
    yield "".join(growing)


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """Return the fields of a value as they are: `encoded` makes them plain, and they are copied once."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
