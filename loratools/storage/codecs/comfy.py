"""ComfyUI's layers with `comfy_quant`, or named in the header's `_quantization_metadata`: JSON with a format each.

    float8_e4m3fn, float8_e5m2   W = q · weight_scale, one number

Other formats are refused by name: their scales lie in the order of a GPU's kernels, or their weights are rotated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from loratools.storage import files
from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs._fp8 import Blocks, fitted
from loratools.storage.codecs._scales import by_inverse
from loratools.storage.codecs.state import HEADER

_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_MOST = 1 << 16
"""Bytes of a layer's JSON; ComfyUI writes some fifty."""


def opened(module: Module) -> Encoding:
    """Return how the weight is stored; raise `UnsupportedAdapter` for other formats, and scales that do not fit it."""
    module.need("weight", "weight_scale")
    stated, weight = _layer(module), module.specs["weight"]
    form = stated.get("format")
    if form not in _FORMATS:
        raise module.refuse(f"its format is {form}, and {' and '.join(_FORMATS)} are read")
    if weight.dtype != _FORMATS[form] or len(weight.shape) < 2:
        raise module.refuse(f"its format is {form}, and its weight {weight.dtype} {list(weight.shape)}")
    rows = prod(weight.shape[:-1])
    return fitted(module, "weight_scale", [Blocks(rows, weight.shape[-1], rows)], by_inverse)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement without these layers: ComfyUI takes a layer that is not in it for a plain one."""
    layers = statement.get("layers")
    if not isinstance(layers, Mapping):
        return dict(statement)
    return {**statement, "layers": {path: layer for path, layer in layers.items() if path not in modules}}


def _layer(module: Module) -> Mapping[str, Any]:
    """Return what is said of the layer: beside it, else in the header, which ComfyUI reads first."""
    layers = module.statement.get("layers")
    stated: Any = layers.get(module.path) if isinstance(layers, Mapping) else None
    if stated is None:
        spec = module.specs["comfy_quant"]
        if spec.dtype != "U8" or spec.nbytes > _MOST:
            raise module.refuse(f"comfy_quant is {spec.dtype} {list(spec.shape)}, and the bytes of JSON were expected")
        raw = bytearray(spec.nbytes)
        with files.opened(spec) as read:
            read(memoryview(raw), 0)
        try:
            stated = json.loads(raw)
        except (ValueError, RecursionError):
            raise module.refuse("comfy_quant is no JSON") from None
    if not isinstance(stated, Mapping):
        raise module.refuse(
            f"{HEADER if layers else 'comfy_quant'} says {stated!r:.60} of it, and an object was expected"
        )
    return stated
