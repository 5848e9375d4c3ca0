"""The unquantized original of a quantized base: its weights, held against the base's before they are built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from loratools.adapter.naming.wrappers import Names
from loratools.errors import WrongBase, counted
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs import Encoding
from loratools.storage.codecs.floats import Array, unsigned, widen
from loratools.storage.header import TensorSpec

_PLAIN = 16  # bits of plain numbers, also where they are read in another basis
_ROWS, _FAR = 32, 0.7
"""Rows of each weight that are compared, and a relative distance that no quantization has: other models have 1.4."""


def weights_of(original: Checkpoint, encodings: Mapping[str, Encoding]) -> dict[str, TensorSpec]:
    """Return the original's tensor for each weight that a base stores as codes.

    Raises `WrongBase` with every weight that the original lacks, has in another shape, has as codes too, or has with
    other numbers than a quantization of it could have.
    """
    names = Names(original.specs, original.config)
    found: dict[str, TensorSpec] = {}
    problems = []
    for name, encoding in encodings.items():
        path, _, parameter = name.rpartition(".")
        candidates = [name] if name in original.specs else names.find(path, parameter)
        spec = original.specs[candidates[0]] if len(candidates) == 1 else None
        if spec is None:
            problems.append(f"{name}: the original has no such tensor")
        elif spec.dtype not in dtypes.FLOATS or (spec.encoding and cast(Encoding, spec.encoding).bits < _PLAIN):
            problems.append(f"{name}: the original has it as {spec.dtype} codes, and numbers are needed")
        elif spec.shape != encoding.shape:
            problems.append(f"{name}: the original has shape {list(spec.shape)}, the base {list(encoding.shape)}")
        elif (distance := _distance(encoding, spec)) > _FAR:
            problems.append(f"{name}: the base differs from the original by {distance:.0%} of it")
        else:
            found[name] = spec
    if problems:
        raise WrongBase(
            f"{original.path} is not the unquantized original of this base: "
            f"{counted(len(problems), 'weight differs', 'weights differ')}",
            problems[:20],
            hint="Give the model that the base was quantized from, in bf16, f16 or f32.",
        )
    return found


def _distance(encoding: Encoding, spec: TensorSpec) -> float:
    """Return ‖W − Q(W)‖/‖W‖ over some rows, evenly spread."""
    rows = int(np.prod(spec.shape[:-1]))
    columns = spec.shape[-1]
    error = norm = 0.0
    with encoding.reader() as read_codes, files.opened(spec) as read:
        for row in np.linspace(0, rows - 1, min(rows, _ROWS)).astype(int):
            W = _row(read, int(row), columns, spec.dtype)
            coded = _row(read_codes, int(row), columns, "F32")
            error += float(np.square(W - coded, dtype=np.float64).sum())
            norm += float(np.square(W, dtype=np.float64).sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _row(read: files.Read, row: int, columns: int, dtype: str) -> Array:
    width = columns * dtypes.bits(dtype) // 8
    raw = memoryview(bytearray(width))
    read(raw, row * width)
    return widen(np.frombuffer(raw, unsigned(dtype)), dtype, np.float64)
