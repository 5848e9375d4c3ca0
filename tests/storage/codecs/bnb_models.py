"""Weights as bitsandbytes stores them, made by the library; its own float32 of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor

M = "model.layers.0.self_attn.q_proj"
SHAPES = [(64, 128), (129, 336), (37, 100), (5, 3), (3, 5, 40)]


def four_bit(W: Tensor, kind: str, double: bool, storage: torch.dtype = torch.uint8, block: int = 64) -> dict[str, Any]:
    """Return what bitsandbytes stores for a weight, by name."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        W, blocksize=block, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    name = f"{M}.weight" if W.ndim == 2 else "model.layers.0.mlp.experts.gate_up_proj"
    return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def eight_bit(W: Tensor) -> dict[str, Any]:
    """Return what bitsandbytes stores for a weight in LLM.int8, by name."""
    nn = pytest.importorskip("bitsandbytes.nn")
    weight = nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return {
        f"{M}.weight": weight.data,
        f"{M}.SCB": weight.SCB,
        f"{M}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def exact(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the library's own float32 of a 4-bit weight, by its generic kernel, which is right for every shape."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key != name}
    state = functional.QuantState.from_dict(parts, device="cpu")
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = stored[name].view(torch.uint8).reshape(-1)
    code = functional.get_4bit_type(state.quant_type, device="cpu")
    with torch.compiler.set_stance("force_eager"):
        values = _dequantize_4bit_compute(codes, absmax, code, state.blocksize, state.shape, torch.float32)
    return cast(Tensor, values.reshape(state.shape))
