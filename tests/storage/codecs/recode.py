"""A base of one quantized module on disk, an adapter of it, its stored parts, and its codes made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratools
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding, Grid
from loratools.storage.files import chunks, read_tensor
from tests.surgery.models import lora, save_adapter, save_base

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


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


def read(folder: Path, path: str = Q) -> Tensor:
    """Return a module's weight, read whole and in odd pieces to the same bytes."""
    spec = logical(Checkpoint.open(folder)).specs[f"{path}.weight"]
    whole = read_tensor(spec)
    assert b"".join(bytes(piece) for piece in chunks(spec, 1004)) == whole.numpy().tobytes()
    return whole


def merges(base: Path, adapter: Path, total: Tensor, untouched: Tensor) -> dict[str, Any]:
    """Merge into Q of a float16 model of Q, K and a head, in 16 bit and partially; return what that states then.

    `total` is the exact sum, `untouched` the weight of K, both in float64.
    """
    whole, part = (base.parent / name for name in ("whole", "part"))
    loratools.merge(base, adapter, whole)
    loratools.merge(base, adapter, part, quantized="partial")
    before, plain, mixed = (load_file(folder / "model.safetensors") for folder in (base, whole, part))
    assert set(plain) == {f"{Q}.weight", f"{K}.weight", "lm_head.weight"}
    assert (plain[f"{Q}.weight"] != total.half()).double().mean() <= 1e-3
    assert torch.equal(plain[f"{K}.weight"], untouched.half())
    assert torch.equal(mixed[f"{Q}.weight"], plain[f"{Q}.weight"])
    assert {name for name in mixed if name.startswith(Q)} == {f"{Q}.weight"}
    assert all(torch.equal(mixed[name], tensor) for name, tensor in before.items() if not name.startswith(Q))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, part)]
    assert "quantization_config" not in configs[0]
    stated: dict[str, Any] = configs[1]["quantization_config"]
    return stated
