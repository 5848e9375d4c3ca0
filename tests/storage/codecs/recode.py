"""A base of one quantized module on disk, an adapter of it, its stored parts, and its codes made again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding, Grid
from tests.surgery.models import lora, save_adapter, save_base


def opened(folder: Path, stored: Mapping[str, Tensor], **config: Any) -> tuple[Checkpoint, Encoding]:
    """Write a base, and return its logical view and how its one module is stored."""
    base = save_base(folder, stored, **config)
    view = logical(Checkpoint.open(base))
    return view, next(iter(encodings(view).values()))


def recoded(encoding: Encoding, W: np.ndarray[Any, Any], grid: Grid, draw: Any = None) -> tuple[dict[str, Any], Any]:
    """Return the parts that an encoder writes, and the numbers that it says they stand for."""
    W = W.reshape(-1, encoding.columns)
    step = 2 * encoding.together
    with encoding.parts() as parts:
        encoder = encoding.encoder(parts, grid, draw)
        for first in range(0, len(W), step) if encoder.needs_pass else ():
            encoder.observe(first, W[first : first + step])
        values = np.concatenate([encoder.encode(row, W[row : row + step]) for row in range(0, len(W), step)])
        return dict(encoder.finish()), values.reshape(encoding.shape)


def held(encoding: Encoding) -> dict[str, np.ndarray[Any, Any]]:
    with encoding.parts() as parts:
        return {part: parts.whole(part) for part in encoding.module.specs}


def saved_lora(folder: Path, path: str, shape: tuple[int, int]) -> Tensor:
    """Write a PEFT adapter of one module; return its ΔW in float64."""
    adapter = lora({path: shape})
    save_adapter(folder, adapter)
    return adapter.delta(path)
