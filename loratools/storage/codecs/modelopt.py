"""NVIDIA modelopt: FP8, NVFP4, MXFP4, and integers of 8 bits and of 4, two rows in a byte; scales of the inputs.

    weight F8, weight_scale                      W = q·scale, by tensor, row or block; MXFP8 by powers of two
    weight U8, weight_scale E4M3, _scale_2       W = level·scale·scale_2 (NVFP4)
    weight U8, weight_scale U8                   W = level·2^(scale - 127) (MXFP4)
    weight U8 [out/2, in], weight_scale float    W = q·scale, q in two's complement, row 2i in the low bits (AWQ)
    weight I8, weight_scale                      W = q·scale, by row

Where there is a `pre_quant_scale`, the layer multiplies its input by it: the weight that counts is
W·diag(pre_quant_scale), and that is what this codec shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np

from loratools.storage import dtypes
from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs._blocks import blocks
from loratools.storage.codecs._fp8 import DTYPES, Fp8, fitted, of_stacks
from loratools.storage.codecs._fp8 import Blocks as Sides
from loratools.storage.codecs._levels import Draw
from loratools.storage.codecs._scales import POWERS, by_power, by_quotient
from loratools.storage.codecs._symmetric import eights, fours
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import numbers

_KINDS = {
    **dict.fromkeys(("FP8", "FP8_PB_WO", "FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"), "FP8"),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"), "NVFP4"),
    **dict.fromkeys(("W4A8_MXFP4_FP8", "MXFP4"), "MXFP4"),
    **dict.fromkeys(("W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ"), "4-bit integers"),
    **dict.fromkeys(("W8A16", "W8A8_SQ_PER_CHANNEL"), "8-bit integers"),
}
"""What config.json's `quant_algo` says that the tensors are."""


def opened(module: Module) -> Encoding:
    """Return how a module is stored; raise `UnsupportedAdapter` where config and tensors disagree."""
    module.need("weight", "weight_scale")
    if module.specs.keys() & {"svdquant_lora_a", "svdquant_lora_b"}:
        raise module.refuse("a low-rank part of its weight is stored beside it (SVDQuant), which is not read")
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    if len(weight.shape) < 2 or not prod(weight.shape):
        raise module.refuse(f"its weight is {weight.dtype} {list(weight.shape)}, and two sides were expected")
    if weight.dtype in DTYPES:
        kind = "FP8"
    elif weight.dtype == "I8":
        kind = "8-bit integers"
    elif weight.dtype != "U8":
        raise module.refuse(f"its weight is {weight.dtype}, with a weight_scale {scale.dtype}")
    else:
        kind = {"F8_E4M3": "NVFP4", "U8": "MXFP4", "F8_E8M0": "MXFP4"}.get(scale.dtype, "4-bit integers")
    module, algorithm = replace(module, scheme=f"{kind} (modelopt)"), _algorithm(module)
    if (stated := _KINDS.get(algorithm)) and stated != kind:
        raise module.refuse(f"config.json says {algorithm}, and its tensors are {kind}")
    encoding = _READERS[kind](module)
    return _with_inputs(encoding) if "pre_quant_scale" in module.specs else encoding


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in its list of plain ones, and in no list of quantized ones."""
    inner = statement.get("quantization")
    if isinstance(inner, Mapping):
        return {**statement, "quantization": plain(inner, modules)}
    key = "exclude_modules" if "exclude_modules" in statement and "ignore" not in statement else "ignore"
    known = [name for name in statement.get(key) or () if isinstance(name, str)]
    new = [path for path in modules if not any(fnmatchcase(path, name) for name in known)]
    changed = {**statement, key: [*known, *new]}
    gone = set(modules)
    if isinstance(layers := statement.get("quantized_layers"), Mapping):
        changed["quantized_layers"] = {path: layer for path, layer in layers.items() if path not in gone}
    if isinstance(groups := statement.get("config_groups"), Mapping):
        changed["config_groups"] = {name: _without(group, gone) for name, group in groups.items()}
    return changed


def _without(group: Any, gone: set[str]) -> Any:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(targets, list):
        return group
    return {**group, "targets": [target for target in targets if not isinstance(target, str) or target not in gone]}


def _algorithm(module: Module) -> str:
    """Return config.json's `quant_algo` of a module, "" where it says none."""
    inner = module.statement.get("quantization")
    stated = inner if isinstance(inner, Mapping) else module.statement
    layers = stated.get("quantized_layers")
    own = layers.get(module.path) if isinstance(layers, Mapping) else None
    return str((own if isinstance(own, Mapping) else stated).get("quant_algo") or "").upper()


def _fp8(module: Module) -> Fp8:
    shape = module.specs["weight"].shape
    rows, columns = shape[-2:]
    if module.specs["weight_scale"].dtype in POWERS:
        return fitted(module, "weight_scale", [Sides(1, 32)], by_power)
    choices = [Sides(rows, columns), Sides(1, columns), Sides(128, 128)]
    return fitted(module, "weight_scale", of_stacks(choices, shape), by_quotient)


def _nvfp4(module: Module) -> Encoding:
    keep = _algorithm(module) == "W4A8_NVFP4_FP8"  # there it is max|w| / 448
    return blocks(module, "weight", whole="weight_scale_2", width=16, name="NVFP4", keep=keep)


_READERS: Mapping[str, Callable[[Module], Encoding]] = {
    "FP8": _fp8, "NVFP4": _nvfp4, "MXFP4": lambda module: blocks(module, "weight"), "4-bit integers": fours,
    "8-bit integers": eights,
}  # fmt: skip


def _with_inputs(inner: Encoding) -> Encoding:
    """Return the encoding of W·diag(pre_quant_scale), of which `inner` is that of W."""
    module, spec = inner.module, inner.module.specs["pre_quant_scale"]
    if spec.dtype not in dtypes.FLOATS or spec.parameters != inner.columns:
        raise module.refuse(f"its pre_quant_scale is {spec.dtype} {list(spec.shape)}, for {inner.columns} columns")
    scales = numbers(module.read("pre_quant_scale"), spec.dtype).reshape(-1)
    if not (np.isfinite(scales).all() and (scales != 0).all()):
        raise module.refuse("its pre_quant_scale has zeros, or no finite numbers")
    label = f"{inner.label}, scales of the inputs"
    return OfInputs(module, inner.shape, label, inner.bits, inner.group, inner.together, inner=inner, scales=scales)


@dataclass(frozen=True, slots=True, eq=False)
class OfInputs(Encoding):
    """W·diag(scales), where `inner` encodes W."""

    inner: Encoding = field(kw_only=True)
    scales: Array = field(kw_only=True)

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write W·diag(scales)."""
        self.inner.decode(parts, first, out)
        out *= self.scales

    def encoder(self, parts: Parts, grid: Grid, draw: Draw | None = None) -> Encoder:
        """Return what makes codes of W / diag(scales) again; see `Encoding.encoder`."""
        return _OfInputs(self, parts, self.inner.encoder(parts, grid, draw))


class _OfInputs:
    """Divides by the scales of the inputs, and multiplies by them."""

    def __init__(self, encoding: OfInputs, parts: Parts, inner: Encoder) -> None:
        self._encoding, self._parts, self._inner = encoding, parts, inner

    @property
    def needs_pass(self) -> bool:
        """Whether the inner encoder needs one."""
        return self._inner.needs_pass

    def observe(self, first: int, W: Array) -> None:
        """Show rows to the inner encoder."""
        self._inner.observe(first, self._divided(first, W))

    def encode(self, first: int, W: Array) -> Array:
        """Encode rows."""
        result: Array = self._inner.encode(first, self._divided(first, W)) * self._encoding.scales
        return result

    def finish(self) -> Mapping[str, Array]:
        """Return what the inner encoder made."""
        return self._inner.finish()

    def _divided(self, first: int, W: Array) -> Array:
        """Return W / diag(scales), and the very number of the code where W is what that stands for."""
        before = np.empty_like(W)
        self._encoding.inner.decode(self._parts, first, before)
        scales = self._encoding.scales
        return np.where(before * scales == W, before, W / scales)
