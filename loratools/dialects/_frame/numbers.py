"""Single numbers in a file: alphas that are read, and scalings for which a file has one value only."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from loratools.decisions import warned
from loratools.errors import BadFile
from loratools.storage.lazy import LazyTensor

LARGEST = 1e300
"""No alpha or scaling of a real adapter is near it; beyond, products with it overflow."""

_CODES = {"BF16": "<f", "F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


def read_number(lazy: LazyTensor, name: str) -> float:
    """Return the one number that a stored tensor holds, without torch; raise `BadFile` where it is none."""
    if lazy.spec is None or lazy.parameters != 1 or lazy.dtype not in _CODES:
        raise BadFile(f"{name}: expected one number, found {lazy.dtype} of shape {lazy.shape}")
    from loratools.storage import files

    raw = bytes(files.read_bytes(lazy.spec))
    padding = b"\0\0" if lazy.dtype == "BF16" else b""  # the upper half of a float32
    value = float(struct.unpack(_CODES[lazy.dtype], padding + raw)[0])
    if not is_number(value):
        raise BadFile(f"{name}: {value} is no alpha")
    return value


def read_whole_numbers(lazy: LazyTensor, name: str, most: int = 8) -> tuple[int, ...]:
    """Return the whole numbers that a small stored tensor holds, without torch; raise `BadFile` for anything else."""
    if lazy.spec is None or not 0 < lazy.parameters <= most or lazy.dtype not in ("I64", "I32"):
        raise BadFile(f"{name}: expected at most {most} whole numbers, found {lazy.dtype} of shape {lazy.shape}")
    code = _CODES[lazy.dtype][1] * lazy.parameters
    from loratools.storage import files

    return struct.unpack(f"<{code}", bytes(files.read_bytes(lazy.spec)))


def is_number(value: object) -> bool:
    """Tell whether a value of a configuration is a finite number that can be a scaling."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]


def tell_alpha(path: Path, alpha: float | None, recorded: Iterable[object]) -> None:
    """Warn where `alpha`, the user's, takes the place of another one that the file at `path` records."""
    others = sorted({f"{value}" for value in recorded if value is not None and value != alpha})
    if alpha is not None and others:
        warned("%s: alpha %g, which the call gives, is taken in place of %s, which the file records",
               path, alpha, ", ".join(others[:12]))  # fmt: skip


def is_float32(value: float) -> bool:
    """Tell whether float32 has exactly this value."""
    return is_float(value, "F32")


def is_float(value: float, dtype: str) -> bool:
    """Tell whether a float dtype has exactly this value: F16, BF16 (the upper half of float32) or F32."""
    if not abs(value) < (6e4 if dtype == "F16" else 3e38):
        return False
    raw = struct.pack(_CODES[dtype], value)
    return struct.unpack(_CODES[dtype], raw)[0] == value and not (dtype == "BF16" and any(raw[:2]))


def most_common(values: Iterable[float], *, smallest: bool = False) -> float:
    """Return the most common value but 0, of equally common ones the largest (or `smallest`); 1 if there is none."""
    counts = Counter(value for value in values if value)
    sign = -1 if smallest else 1
    return max(counts, key=lambda value: (counts[value], sign * value), default=1.0)
