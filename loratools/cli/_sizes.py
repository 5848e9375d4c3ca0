"""Sizes in bytes as people write them."""

from __future__ import annotations


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5GB`, `500MB`, `2GiB` or `1000000`; raise `ValueError`."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BKMGTibkmgt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a size above zero")
    return size
