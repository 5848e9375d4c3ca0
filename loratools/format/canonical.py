"""Canonical JSON (RFC 8785): one text for one value, so that equal manifests have equal bytes and one digest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from json.encoder import encode_basestring
from typing import Any

_SIGNS = bytes.maketrans(b"123456789,[", b"0" * 9 + b"::")
"""What a text becomes in which numbers are looked for: every digit is 0, and what comes before a number is a colon."""

_ENCODER = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False
)

_UNUSUAL = rb":(0(?:0*[.eE][-+.0eE]*|0{15,}))"
"""A number with a fraction or of many digits, without its sign, or what looks like one in a string."""


def canonical_object(value: Mapping[str, Any]) -> str:
    """Return the canonical JSON text of what JSON can say: all names in it are strings. Else like `canonical`, sooner.

    Python's own encoder writes such a text but for the order of names beyond ASCII and the forms of some numbers; where
    it has either, the text is made piece by piece.
    """
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError):
        return canonical(value)
    if not text.isascii():
        return canonical(value)
    bare = text.replace("blake3:", "").replace("sha256:", "")  # many digests look like numbers after their colon
    unusual = re.finditer(_UNUSUAL, bare.encode().translate(_SIGNS).replace(b":-", b"::"))
    return text if all(_is_canonical(bare[slice(*match.span(1))]) for match in unusual) else canonical(value)


def _is_canonical(number: str) -> bool:
    """Tell whether Python writes a number as RFC 8785 does."""
    if number.lstrip("-").isdigit():
        return len(number) < 16
    return "e" not in number and not number.endswith(".0") and len(number) < 20


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value (RFC 8785): sorted names, no spaces, shortest numbers.

    Raises `ValueError` for what such a text cannot hold: NaN, infinities, integers beyond 2^53 - 1, lone surrogates.
    """
    if isinstance(value, str):
        return _text(value)
    if type(value) is float:  # before what takes long to tell
        return _number(value)
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a JSON object has only strings as names")
        return "{" + ",".join([f"{_text(name)}:{canonical(value[name])}" for name in _ordered(value)]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(value)
    raise ValueError(f"{type(value).__name__} is not a JSON type")


def canonical_parts(value: Mapping[str, Any], plain: Collection[str]) -> str:
    """Return what `canonical` does, sooner where parts are large: those named in `plain` are objects or lists of JSON.

    All names in these are strings, as `canonical_object` asks.
    """
    if not all(isinstance(name, str) for name in value):
        return canonical(value)
    return joined({name: (canonical_object if name in plain else canonical)(part) for name, part in value.items()})


def texts_of(value: Mapping[str, Any]) -> dict[str, str]:
    """Return the canonical text of each member of an object that JSON said; `joined`, they are its own.

    Raises `ValueError` as `canonical` does.
    """
    return {name: (canonical_object if type(part) is dict else canonical)(part) for name, part in value.items()}


def joined(texts: Mapping[str, str]) -> str:
    """Return the canonical text of an object whose members have these."""
    return "{" + ",".join([f"{_text(name)}:{texts[name]}" for name in _ordered(texts)]) + "}"


def unsaid(value: Any, at: str = "") -> Iterator[str]:
    """Yield what of a value has no canonical text: where it stands, as names with dots between them, and why."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        for name, part in value.items():
            yield from unsaid(part, f"{at}.{name}" if at else name)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from unsaid(part, f"{at}[{number}]")
    else:
        try:
            canonical(value)
        except ValueError as error:
            yield f"{at}: {error}" if at else str(error)


def said(value: Any) -> Any:
    """Return a value in which every number that has no canonical text is a text itself: `1.8078e+17`.

    RFC 8785 writes whole numbers below 1e21 in digits alone, and those beyond 2^53 - 1 are no numbers of I-JSON.
    """
    if isinstance(value, Mapping):
        return {name: said(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [said(part) for part in value]
    if type(value) is int and abs(value) >= 2**53:
        return str(value)
    if isinstance(value, float) and not (math.isfinite(value) and (abs(value) < 2**53 or abs(value) >= 1e21)):
        return repr(value)
    return value


def _ordered(names: Collection[str]) -> list[str]:
    # ASCII is in the order of UTF-16 as it is.
    return sorted(names) if "".join(names).isascii() else sorted(names, key=lambda name: name.encode("utf-16-be"))


def _text(value: str) -> str:
    if not value.isascii():
        value.encode()  # which a lone surrogate cannot
    return encode_basestring(value)


def _number(value: int | float) -> str:
    # The shortest digits that read back as the same binary64, laid out as ECMAScript does.
    if isinstance(value, int):
        if abs(value) >= 2**53:
            raise ValueError(f"the integer {value} is beyond 2^53 - 1")
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    usual = repr(value)
    if 1e-4 <= abs(value) < 1e15:  # which Python writes without an exponent too
        return usual
    from decimal import Decimal

    sign, figures, exponent = Decimal(usual).as_tuple()
    digits = "".join(map(str, figures)).rstrip("0")
    point = len(figures) + int(exponent)  # the value is 0.digits * 10^point
    if len(digits) <= point <= 21:
        if abs(value) >= 2**53:  # would be read back as an integer, which is out of bounds
            raise ValueError(f"the number {value:g} is beyond 2^53 - 1")
        text = digits.ljust(point, "0")
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if len(digits) > 1 else ''}{digits[1:]}e{point - 1:+d}"
    return f"-{text}" if sign else text
