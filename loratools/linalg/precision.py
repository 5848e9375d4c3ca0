"""Products of float32 matrices in float32: no TF32 on a GPU, no bfloat16 on a processor, whatever the process allows.

Torch has two sets of switches, and raises where one is read after the other was set: an old one for all back ends
(`torch.set_float32_matmul_precision`), and from 2.9 on one for each (`fp32_precision`). Either is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FULL = ("none", "ieee")  # as `fp32_precision` says it: the default of the two back ends, and by name


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 matrices in full float32 while the block runs; what was set before comes back.

    The switches are the process's: other threads compute so too meanwhile.
    """
    # Old versions of torch lack the newer switches.
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    newer = [each for each in backends if hasattr(each, "fp32_precision")]
    before = [each.fp32_precision for each in newer]
    old = _old_switch()
    if all(value in _FULL for value in before) and old in (None, "highest"):
        yield
        return
    if old is not None:
        torch.set_float32_matmul_precision("highest")
    else:
        _set(newer, ["ieee"] * len(newer))
    try:
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        _set(newer, before)


def _old_switch() -> str | None:
    """Return what the old switch says; None where the newer ones say what it cannot."""
    try:
        # The precision alone does not tell all: `allow_tf32` may differ from it, and raises then.
        return torch.get_float32_matmul_precision() if torch.backends.cuda.matmul.allow_tf32 is not None else None
    except RuntimeError:
        return None


def _set(backends: list[Any], values: list[str]) -> None:
    for backend, value in zip(backends, values, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = value
