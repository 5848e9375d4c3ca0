"""MLX: groups of codes along a row, affine of 2 to 8 bits, or the float codes of mxfp4, mxfp8 and nvfp4.

Affine: W = q · scale + bias in float32; mlx itself computes it in the dtype of its scales, up to one step of BF16 from
it. Float modes: W = level(q) · scale, scales of 8 bits: powers of two (mxfp4, mxfp8) or E4M3 (nvfp4), which
`global_scale` / 2688 multiplies where there is one. Codes lie in words of 32 bits, the first in the lowest bits.
config.json's `quantization` has the mode, bits and group of all modules, and of single ones by their path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit, Stored
from loratools.storage.codecs._levels import Draw, Floats, Whole
from loratools.storage.codecs._packed import pack, unpack
from loratools.storage.codecs._scales import by_power, read_back, rounded, stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import E2M1, numbers, table

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
    if not scales.shape[-1]:
        raise module.refuse(f"it has no columns: scales {list(scales.shape)}")
    mode, bits, size = _settings(module)
    columns = scales.shape[-1] * size
    if weight.shape[-1] * 32 != columns * bits:
        raise module.refuse(
            f"its weight {list(weight.shape)}, scales {list(scales.shape)} do not fit {bits} bits in groups of {size}"
        )
    label = f"MLX {bits} bit, groups of {size}" if mode == "affine" else f"MLX {mode}, groups of {size}"
    shape = (*weight.shape[:-1], columns)
    if mode == "affine":
        return Affine(
            module, shape, label, bits, (1, size), levels=Whole(bits, signed=False), width=size, codes_part="weight"
        )
    levels = _FP4 if bits == 4 else _FP8
    return FloatMode(module, shape, label, bits, (1, size), levels=levels, width=size, codes_part="weight", mode=mode)


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
class _Fp4(Floats):
    """E2M1 as mlx rounds to it: of two codes as near the one nearer to zero, and zero without a sign."""

    def codes(self, x: Array, draw: Draw | None = None) -> Array:
        """Return the codes of numbers."""
        if draw is None:
            size = np.abs(np.nan_to_num(x, nan=0.0))
            codes = np.searchsorted((self.table[1:8] + self.table[:7]) / 2, size, side="left").astype(np.uint8)
        else:
            codes = super(_Fp4, self).codes(np.abs(x), draw)
        signed: Array = codes | np.where((codes > 0) & (x < 0), np.uint8(8), np.uint8(0))
        return signed


@dataclass(frozen=True, slots=True, eq=False)
class _Fp8:
    """E4M3 as levels."""

    most: float = 448.0
    least: float = -448.0

    @property
    def table(self) -> Array:
        """The numbers by code."""
        return table("F8_E4M3")

    def codes(self, x: Array, draw: Draw | None = None) -> Array:
        """Return the codes of numbers."""
        return rounded(np.nan_to_num(x, nan=0.0), "F8_E4M3", draw(x.shape) if draw else None)


_FP4, _FP8 = _Fp4(E2M1), _Fp8()


@dataclass(frozen=True, slots=True, eq=False)
class Mlx(Grouped):
    """Codes in words of 32 bits, row by row."""

    scale_part: ClassVar[str] = "scales"

    @property
    def name(self) -> str:
        """The name of the weight where it is stored plainly: stacks of experts have a `weight` of their own."""
        return f"{self.module.path}.weight"

    def codes(self, parts: Parts, first: int, count: int) -> Array:
        """Return so many rows of codes from `first` on, uint8 (count, columns)."""
        return unpack(parts.joined("weight", first, first + count), self.bits, self.columns)

    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes."""
        return pack(codes, self.bits, 4 * self.module.specs["weight"].shape[-1])

    def of_stack(self, rows: Array) -> Array:
        """Return rows of a part with the sides of a stack."""
        return rows.reshape(*self.shape[:-1], -1)


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Mlx):
    """W = q · scale + bias; the biases take the place of zero points."""

    def stored(self, parts: Parts, first: int, count: int) -> Stored:
        """Return so many rows from `first` on."""
        dtype = self.module.specs["scales"].dtype
        scales, biases = (numbers(parts.joined(part, first, first + count), dtype) for part in ("scales", "biases"))
        return Stored(self.codes(parts, first, count), scales, biases)

    def numbers(self, stored: Stored, out: Array) -> None:
        """Write what rows stand for."""
        assert stored.zeros is not None
        np.copyto(out, stored.codes)
        self.apply(np.multiply, out, stored.scales)
        self.apply(np.add, out, stored.zeros)

    def places(self, W: Array, stored: Stored) -> Array:
        """Return (W − bias) / scale."""
        assert stored.zeros is not None
        x = W.copy()
        self.apply(np.subtract, x, stored.zeros)
        self.apply(np.divide, x, np.where(stored.scales == 0, np.float32(1), stored.scales))
        return x

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return scales and biases as mx.quantize makes them of numbers in the dtype of the scales.

        scale = ±(max − min) / (2^bits − 1), at least 1e-7, then set so that the edge of larger magnitude is a level;
        bias is that edge. Numbers are rounded by the scale before that is rounded.
        """
        dtype = self.module.specs["scales"].dtype
        lows, highs = (read_back(edge, dtype) for edge in (lows, highs))
        below = np.abs(lows) > np.abs(highs)
        scale = np.maximum((highs - lows) / np.float32(self.levels.most), np.float32(1e-7))
        scale = np.where(below, scale, -scale)
        edge = np.where(below, lows, highs)
        steps = np.rint(edge / scale)
        by = np.where(steps != 0, edge / np.where(steps != 0, steps, 1), scale)
        kept = np.stack([stored(by, dtype), stored(np.where(steps != 0, edge, 0), dtype)], axis=-1)
        scales, biases = (numbers(kept[..., i], dtype) for i in (0, 1))
        return Fit(scales, kept, biases, W=read_back(W, dtype), by=by)

    def kept(self, parts: Parts) -> Array:
        """Return all scales and biases as they are stored, in the form of `Fit.kept`."""
        return np.stack([parts.whole(part).reshape(-1, self.groups) for part in ("scales", "biases")], axis=-1)

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, scales and biases as they are stored."""
        parts = {"weight": self.of_stack(packed.view("<u4"))}
        if fit is not None:
            for i, part in enumerate(("scales", "biases")):
                parts[part] = self.of_stack(np.ascontiguousarray(fit.kept[..., i]))
        return parts


@dataclass(frozen=True, slots=True, eq=False)
class FloatMode(Mlx):
    """W = level · scale, of a `mode`: mxfp4, mxfp8 or nvfp4."""

    mode: str = "mxfp4"

    def stored(self, parts: Parts, first: int, count: int) -> Stored:
        """Return so many rows from `first` on."""
        scales: Array = table(_FLOATS[self.mode][2])[parts.joined("scales", first, first + count)]
        if "global_scale" in self.module.specs:
            scales *= self._of_matrices(parts, first, count)
        return Stored(self.codes(parts, first, count), scales)

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return scales as mx.quantize makes them of float32: the least power of two of at least max / largest level.

        nvfp4: max / 6 in E4M3.
        """
        most, dtype = np.maximum(-lows, highs), _FLOATS[self.mode][2]
        if dtype == "F8_E8M0":
            kept = stored(by_power(most, self.levels.most)[0], dtype)
        else:
            kept = rounded(most / np.float32(self.levels.most), dtype)
        return Fit(table(dtype)[kept], kept)

    def encoder(self, parts: Parts, grid: Grid, draw: Draw | None = None) -> Encoder:
        """Return what makes codes again; raise `UnsupportedAdapter` for new scales beside a `global_scale`."""
        if grid == "fresh" and "global_scale" in self.module.specs:
            raise self.module.refuse("it has a global_scale, to which no new scales are fitted", "Use its own grid.")
        return Grouped.encoder(self, parts, grid, draw)

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes and scales as they are stored."""
        return {"weight": self.of_stack(packed.view("<u4")), **self.new_scales(fit)}

    def _of_matrices(self, parts: Parts, first: int, count: int) -> Array:
        """Return what multiplies all of a matrix, for each of these rows."""
        per_matrix = parts.numbers("global_scale").reshape(-1) / np.float32(448 * 6)
        return per_matrix[np.arange(first, first + count) // self.shape[-2]][:, None]
