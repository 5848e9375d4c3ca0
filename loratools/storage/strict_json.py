"""Strict JSON, for files that strangers wrote: one object, in UTF-8, with no name twice and only finite numbers."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from loratools.errors import BadFile
from loratools.storage.sources import open_file

MAX_JSON = 16_000_000
"""Bytes of a JSON file where nothing else is said; a real config has some thousands. Python's objects for it can take
twenty times as many."""

MAX_INDEX = 64_000_000
"""Bytes of the index of a model's files, or of the record of a merge; those of the largest models have ten million."""


_SIGNS = bytes.maketrans(b"123456789" + b" \t\r\n,[", b"0" * 9 + b":" * 6)
"""What a text becomes to look for odd numbers: every digit is 0, and what comes before a number is a colon."""

_NEGATIVE, _LONG = b":-", b":" + b"0" * 21


def read_json(path: Path, *, strict: bool = False, most: int | None = None) -> dict[str, Any]:
    """Read a JSON file that must be one object, of at most `most` bytes (default: `MAX_JSON`); raise `BadFile`.

    Unless `strict`, NaN and Infinity are allowed, and white space around the object.
    """
    most = most or MAX_JSON
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise BadFile(f"{path}: larger than {most} bytes")
        raw = file.read(size)  # not `most`: Python sets aside what it is asked for
    return parse_json_object(raw if strict else raw.strip(), path, constants=not strict)


def parse_json_object(raw: bytes, path: Path, *, constants: bool = False) -> dict[str, Any]:
    """Parse strict JSON that must be one object: UTF-8, no duplicate names, no NaN, no lone surrogates (RFC 7493).

    `constants` lets NaN and Infinity pass, which transformers writes into some configs. Raises `BadFile`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise BadFile(f"{path}: the name {twice!r:.200} occurs twice in one JSON object")
        return members

    def constant(text: str) -> float:
        if constants:
            return float(text)
        raise BadFile(f"{path}: {text} is not a JSON number")

    def finite(text: str) -> float:
        value = float(text)
        if math.isinf(value) and not constants:
            raise BadFile(f"{path}: {text[:40]}… is a number beyond every float")
        return value

    def number(text: str) -> int | float:
        # serde reads "-0" as a float; a shape of -0 must not pass here when it fails there.
        return finite(text) if text == "-0" or len(text) > 20 else int(text)

    try:
        text = raw.decode("utf-8")
        if not text.startswith("{"):
            raise BadFile(f"{path}: not the JSON object that was expected: it begins with {text[:12]!r}")
        # A negative integer or a long one is read by a function of Python, which then is called for each number.
        signs = raw.translate(_SIGNS)
        odd = number if _NEGATIVE in signs or _LONG in signs else None
        document = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=odd, parse_float=finite
        )
        if b"\\u" in raw and re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except UnicodeError:
        raise BadFile(f"{path}: the JSON is not valid UTF-8") from None
    except RecursionError:
        raise BadFile(f"{path}: the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: damaged JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise BadFile(f"{path}: damaged JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadFile(f"{path}: expected one JSON object")
    return document
