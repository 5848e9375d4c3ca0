"""MLX: groups of codes along a row, affine of 2 to 8 bits, or the float codes of mxfp4, mxfp8 and nvfp4.

Affine: W = q · scale + bias in float32; mlx itself computes it in the dtype of its scales, up to one step of BF16 from
it. Float modes: W = level(q) · scale, scales of 8 bits: powers of two (mxfp4, mxfp8) or E4M3 (nvfp4), which
`global_scale` / 2688 multiplies where there is one. Codes lie in words of 32 bits, the first in the lowest bits.
config.json's `quantization` has the mode, bits and group of all modules, and of single ones by their path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._packed import unpack
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import E2M1, table
from loratools.storage.header import TensorSpec

_AFFINE_BITS, _AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
_FLOATS = {"mxfp4": (4, 32, "F8_E8M0"), "nvfp4": (4, 16, "F8_E4M3"), "mxfp8": (8, 32, "F8_E8M0")}
"""Mode -> bits, columns of a group, dtype of the scales."""


def opened(module: Module) -> Encoding:
    """Return how an MLX weight is stored; raise `UnsupportedAdapter` where tensors and config.json do not agree."""
    module.need("weight", "scales")
    weight, scales = module.specs["weight"], module.specs["scales"]
    if weight.dtype != "U32" or len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1]:
        raise module.refuse(
            f"its weight {weight.dtype} {list(weight.shape)} and scales {list(scales.shape)} do not fit"
        )
    mode, bits, size = _settings(module)
    columns = scales.shape[-1] * size
    if weight.shape[-1] * 32 != columns * bits:
        raise module.refuse(
            f"its weight {list(weight.shape)}, scales {list(scales.shape)} do not fit {bits} bits in groups of {size}"
        )
    label = f"MLX {bits} bit, groups of {size}" if mode == "affine" else f"MLX {mode}, groups of {size}"
    flat = {part: replace(spec, shape=(prod(spec.shape[:-1]), spec.shape[-1])) for part, spec in _matrices(module)}
    module = replace(module, specs={**module.specs, **flat})  # of a stack, rows are read from where they begin
    return Mlx(module, (*weight.shape[:-1], columns), label, bits, (1, size), 1, mode)


def _matrices(module: Module) -> Iterator[tuple[str, TensorSpec]]:
    return ((part, spec) for part, spec in module.specs.items() if part in ("weight", "scales", "biases"))


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with `false` for these modules, as mlx-lm reads it."""
    return {**statement, **dict.fromkeys(modules, False)}


def _settings(module: Module) -> tuple[str, int, int]:
    """Return mode, bits and columns of a group: the module's own or the model's, that its tensors fit."""
    own = module.statement.get(module.path)
    stated = own if isinstance(own, Mapping) else module.statement
    scales, biases = module.specs["scales"], module.specs.get("biases")
    if scales.dtype == "U8":
        ratio = module.specs["weight"].shape[-1] * 32 // max(1, scales.shape[-1])
        modes = [mode for mode, (bits, size, _) in _FLOATS.items() if bits * size == ratio]
        if biases is not None or not modes:
            raise module.refuse("its scales are bytes, which do not fit mxfp4, mxfp8 or nvfp4")
        if isinstance(own, Mapping) and own.get("mode", "affine") != modes[0]:
            raise module.refuse(f"config.json says {own.get('mode', 'affine')}, its tensors are {modes[0]}")
        return modes[0], *_FLOATS[modes[0]][:2]
    if biases is None or (biases.dtype, biases.shape) != (scales.dtype, scales.shape):
        raise module.refuse("it has no biases like its scales")
    if scales.dtype not in ("BF16", "F16", "F32"):
        raise module.refuse(f"its scales are {scales.dtype}")
    ratio = module.specs["weight"].shape[-1] * 32
    fitting = [
        (bits, size) for bits in _AFFINE_BITS for size in _AFFINE_GROUPS if bits * size * scales.shape[-1] == ratio
    ]
    said = (stated.get("bits", 4), stated.get("group_size", 64)) if stated else None
    if stated.get("mode", "affine") == "affine" and said in fitting:
        return "affine", *said
    if own is None and len(fitting) == 1:  # mlx-lm infers what config.json does not say of a module
        return "affine", *fitting[0]
    raise module.refuse(
        f"config.json says {said[0]} bits in groups of {said[1]}" if said else "config.json says nothing of it",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Mlx(Encoding):
    """Codes of a `mode`: affine, mxfp4, mxfp8 or nvfp4."""

    mode: str = "affine"

    @property
    def name(self) -> str:
        """The name of the weight where it is stored plainly: stacks of experts have a `weight` of their own."""
        return f"{self.module.path}.weight"

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q · scale + bias, or level · scale."""
        rows = slice(first, first + len(out))
        q = unpack(parts.rows("weight", rows.start, rows.stop), self.bits, self.columns)
        assert self.group is not None
        target = out if out.flags.c_contiguous else np.empty_like(out, order="C")
        blocks = target.reshape(len(out), -1, self.group[1])
        if self.mode == "affine":
            np.copyto(target, q)
            blocks *= parts.numbers("scales", rows.start, rows.stop)[:, :, None]
            blocks += parts.numbers("biases", rows.start, rows.stop)[:, :, None]
        else:
            np.take(E2M1 if self.bits == 4 else table("F8_E4M3"), q, out=target)
            blocks *= self.float_scales(parts, rows)[:, :, None]
        if target is not out:
            np.copyto(out, target)

    def float_scales(self, parts: Parts, rows: slice) -> Array:
        """Return the scales of a float mode, float32 (rows, groups), with what multiplies all of a matrix."""
        scales: Array = table(_FLOATS[self.mode][2])[parts.rows("scales", rows.start, rows.stop)]
        if "global_scale" not in self.module.specs:
            return scales
        per_matrix = parts.numbers("global_scale").reshape(-1) / np.float32(448 * 6)
        scales *= per_matrix[np.arange(rows.start, rows.stop) // self.shape[-2]][:, None]
        return scales
