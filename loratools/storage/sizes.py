"""Sizes in bytes, as people write them."""

from __future__ import annotations

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return a size in bytes: a number as it is, or a text such as `5GB`, `500MB`, `2GiB` or `1000000`.

    Raises `ValueError` for a text that is no size, and for a size that is not above zero.
    """
    count = size if isinstance(size, int) and not isinstance(size, bool) else _read(size)
    if count <= 0:
        raise ValueError(f"{size!r} is not a size above zero")
    return count


def _read(size: object) -> int:
    try:
        if not isinstance(size, str):
            raise ValueError
        text = size.strip()
        number = text.rstrip("BKMGTibkmgt ")
        return int(float(number) * _UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{size!r} is not a size; write it like 5GB, 500MB or 2GiB") from None


def parse_budget(text: str, bits: int) -> int:
    """Return a budget as a number of parameters: `500000` or `2M`, or what `8MB` hold of parameters of so many bits.

    Raises `ValueError` for a text that is neither, and for a budget that is not above zero.
    """
    letters = text.strip().upper()
    try:
        if letters.endswith("B"):
            return parse_size(text) * 8 // bits
        return parse_size(f"{text.strip()}B" if letters[-1:] in ("K", "M", "G") else text)
    except ValueError:
        raise ValueError(f"{text!r} is no budget: write 20M parameters, or 64MB") from None
