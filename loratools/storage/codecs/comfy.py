"""ComfyUI's layers with `comfy_quant`, or named in the header's `_quantization_metadata`: JSON with a format each.

    float8_e4m3fn, float8_e5m2   W = q · weight_scale, one number
    int8_tensorwise              W = q · weight_scale, one number or one for each row
    mxfp8, nvfp4                 see `_tiled`: read only

Other formats are refused by name, as are rotated weights (`convrot`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs._fp8 import Blocks, fitted
from loratools.storage.codecs._integers import integers
from loratools.storage.codecs._scales import by_inverse
from loratools.storage.codecs._tiled import mxfp8, nvfp4
from loratools.storage.codecs.state import HEADER
from loratools.storage.files import read_bytes

_MOST = 1 << 16
"""Bytes of a layer's JSON; ComfyUI writes some fifty."""


def opened(module: Module) -> Encoding:
    """Return how the weight is stored; raise `UnsupportedAdapter` for other formats, and scales that do not fit it."""
    module.need("weight", "weight_scale")
    stated = _layer(module)
    form, parameters = stated.get("format"), stated.get("params")
    rotated = [said for said in (stated, parameters) if isinstance(said, Mapping) and said.get("convrot")]
    if rotated or "pre_quant_scale" in module.specs:
        raise module.refuse(f"its weight is {'rotated (convrot)' if rotated else 'scaled (pre_quant_scale)'}")
    if not isinstance(form, str) or form not in _READ:
        raise module.refuse(f"its format is {form}, and {', '.join(_READ)} are read")
    return _READ[form](module)


def _float8(dtype: str) -> Callable[[Module], Encoding]:
    def read(module: Module) -> Encoding:
        weight = module.specs["weight"]
        if weight.dtype != dtype or len(weight.shape) < 2:
            raise module.refuse(f"its format is {dtype}, and its weight {weight.dtype} {list(weight.shape)}")
        rows = prod(weight.shape[:-1])
        return fitted(module, "weight_scale", [Blocks(rows, weight.shape[-1], rows)], by_inverse)

    return read


def _int8(module: Module) -> Encoding:
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise module.refuse(f"its format is int8_tensorwise, and its weight {weight.dtype} {list(weight.shape)}")
    return integers(module, "weight", {"num_bits": 8, "strategy": "tensor" if scale.parameters == 1 else "channel"})


_READ: Mapping[str, Callable[[Module], Encoding]] = {
    "float8_e4m3fn": _float8("F8_E4M3"), "float8_e5m2": _float8("F8_E5M2"), "int8_tensorwise": _int8, "mxfp8": mxfp8,
    "nvfp4": nvfp4,
}  # fmt: skip


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
        try:
            stated = json.loads(bytes(read_bytes(spec)))
        except (ValueError, RecursionError):
            raise module.refuse("comfy_quant is no JSON") from None
    if not isinstance(stated, Mapping):
        raise module.refuse(
            f"{HEADER if layers else 'comfy_quant'} says {stated!r:.60} of it, and an object was expected"
        )
    return stated
