"""YAML of strangers: names and plain values, in time and memory that grow with the text alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loratools.errors import BadFile

MAX_YAML = 1_000_000
"""Bytes of a document; NeMo's configurations have some ten thousand, the front matter of cards a hundred thousand."""

_MAX_DEPTH, _MAX_DIGITS, _MAX_KEY = 64, 100, 15
# What becomes a number: with colons it is one in base sixty, whose digits are joined in quadratic time.
_NUMBER = re.compile(r"[-+.]?[0-9][-+.:_0-9a-zA-Z]*")


def parse_yaml(text: str, where: str) -> dict[Any, Any] | None:
    """Return a document of names and values; None for an empty one. `where` begins the sentence of an error.

    Raises `BadFile` for what is no YAML or too large; for tags; for aliases and depth, by which a short document
    becomes an endless one; for numbers of many digits, and as names, where all of them can have one hash.
    """
    import yaml  # type: ignore[import-untyped,unused-ignore]

    if len(text) > MAX_YAML:
        raise BadFile(f"{where} is larger than {MAX_YAML} bytes")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
    try:
        if fault := next(_faults(yaml.parse(text, Loader=loader), yaml), None):
            raise BadFile(f"{where} {fault}")
        document = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadFile(f"{where} is not plain YAML: {' '.join(str(error).split())[:200]}") from None
    if document is not None and not isinstance(document, dict):
        raise BadFile(f"{where} is not names and values")
    return document


def _faults(events: Any, yaml: Any) -> Iterator[str]:
    """Yield what is wrong with a document, from its events, before anything is built of them."""
    counts: list[int | None] = []  # for each collection around: the events inside a mapping so far, None for a list
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            counts.pop()
            continue
        is_key = bool(counts) and counts[-1] is not None and counts[-1] % 2 == 0
        if counts and counts[-1] is not None:
            counts[-1] += 1
        if isinstance(event, yaml.AliasEvent):
            yield "has aliases, which can make an endless document of a short one"
        elif isinstance(event, yaml.CollectionStartEvent):
            counts.append(0 if isinstance(event, yaml.MappingStartEvent) else None)
            if len(counts) > _MAX_DEPTH:
                yield f"is nested more than {_MAX_DEPTH} deep"
        elif isinstance(event, yaml.ScalarEvent):
            length, most = len(event.value), _MAX_KEY if is_key else _MAX_DIGITS
            if length > most and event.implicit[0] and _NUMBER.fullmatch(event.value):
                yield f"has a number of {length} characters{' as a name' if is_key else ''}"
