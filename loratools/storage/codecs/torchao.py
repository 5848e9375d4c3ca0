"""torchao: Int8Tensor, Float8Tensor, Int4Tensor and IntxUnpackedToInt8Tensor, flattened into safetensors.

A weight is `_weight_qdata` beside `_weight_scale`, perhaps `_weight_zero_point`; of which class it is, and the block
that shares a scale, is JSON in the file's header, under the weight's name. W = (q - zero)·scale; of Int4Tensor
q·scale + zero, scales and zero points transposed, codes two a byte, the first in the low half. Layouts of kernels are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._fp8 import Blocks, Fp8, fitted
from loratools.storage.codecs._groups import Fit, Stored
from loratools.storage.codecs._integers import Integers
from loratools.storage.codecs._levels import Whole
from loratools.storage.codecs._scales import by_quotient
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import listed
from loratools.storage.codecs.tables import numbers
from loratools.storage.strict_json import parse_json_object

_PARTS = "_tensor_data_names"
_LEAST = {"F64": 2.0**-23, "F32": 2.0**-23, "F16": 2.0**-14, "BF16": 2.0**-126}
"""The least scale by its dtype: that of Int8Tensor, which has float32, and the smallest normal number."""


def opened(module: Module) -> Encoding:
    """Return how a weight of torchao is stored; raise `UnsupportedAdapter` for a layout that is a kernel's."""
    kind, data = _class(module)
    if data.pop(_PARTS, None) or any(part.endswith("act_pre_scale") for part in module.specs):
        raise module.refuse("its act_pre_scale scales what goes in (AWQ, SmoothQuant): it is a weight in another basis")
    if kind not in _CLASSES:
        raise module.refuse(f"{kind} is the layout of a kernel, or one that loratools does not know")
    module.need("qdata", "scale")
    shape = module.specs["qdata"].shape
    block = data.get("block_size")
    if len(shape) not in (2, 3) or not prod(shape):
        raise module.refuse(f"its qdata is {list(shape)}, and (out, in) or a stack of them was expected")
    if not isinstance(block, list) or len(block) != len(shape) or any(type(n) is not int or n < 1 for n in block):
        raise module.refuse(f"its header says block_size {block!r:.80} of {kind}")
    return _CLASSES[kind](module, kind, data, tuple(block))


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `modules_to_not_convert`."""
    return {**statement, "modules_to_not_convert": listed(statement, "modules_to_not_convert", modules)}


def _class(module: Module) -> tuple[str, dict[str, Any]]:
    """Return the class of a weight and its attributes, as the header of its file says them."""
    text = next(
        (module.metadata[key] for key in (f"{module.path}.weight", module.path) if key in module.metadata), None
    )
    if text is None:
        raise module.refuse("the header of its file does not say of which class it is")
    file = module.specs["qdata"].file
    try:
        told = parse_json_object(text.encode("utf-8", "replace"), file)
    except BadFile as error:
        raise module.refuse(f"what the header says of it is damaged: {error}") from None
    data = told.get("_data")
    if not isinstance(told.get("_type"), str) or not isinstance(data, dict):
        raise module.refuse(f"the header says {text[:80]!r} of it")
    parts = told.get(_PARTS)
    return told["_type"], {**data, _PARTS: isinstance(parts, list) and "act_pre_scale" in parts}


def _float8(module: Module, kind: str, data: Mapping[str, Any], block: tuple[int, ...]) -> Encoding:
    shape = module.specs["qdata"].shape
    height, width = _sides(module, shape, block, module.specs["scale"].shape)
    parts = {"qdata": "weight"}
    specs = {parts.get(part, part): spec for part, spec in module.specs.items()}
    names = {parts.get(part, part): name for part, name in module.names.items()}
    rows = shape[-2] if height <= shape[-2] else prod(shape[:-1])
    found = fitted(replace(module, specs=specs, names=names), "scale", [Blocks(height, width, rows)], by_quotient)
    return Float8(
        found.module, shape, found.label, 8, found.group, found.together, found.scale, rows=found.rows, rule=found.rule
    )


def _integer(module: Module, kind: str, data: Mapping[str, Any], block: tuple[int, ...]) -> Encoding:
    qdata, scale, zero = module.specs["qdata"], module.specs["scale"], module.specs.get("zero_point")
    if qdata.dtype != "I8" or scale.dtype not in dtypes.FLOATS:
        raise module.refuse(f"its qdata is {qdata.dtype} and its scale {scale.dtype}; I8 and floats were expected")
    if zero is not None and (zero.shape != scale.shape or zero.dtype not in ("I8", *dtypes.FLOATS)):
        raise module.refuse(
            f"its zero_point {zero.dtype} {list(zero.shape)} does not fit its scale {list(scale.shape)}"
        )
    height, width = _sides(module, qdata.shape, block, scale.shape)
    bits = 7 if data.get("reduce_range") else 8
    if kind != "Int8Tensor":
        named = data.get("target_dtype")
        word = named.get("_data") if isinstance(named, dict) else None
        bits = next((n for n in range(1, 9) if word == f"int{n}"), 0)
        if not bits:
            raise module.refuse(f"its header says target_dtype {named!r:.80}")
    rows, columns = prod(qdata.shape[:-1]), qdata.shape[-1]
    by = {(rows, columns): "one scale a tensor", (1, columns): "one scale a row"}.get((height, width))
    label = f"{kind} of {bits} bits, {by or f'blocks of {height} × {width}'}"
    together = height if height < rows else 1
    levels = Whole(bits, bytes=True)
    zeros = "" if zero is None else "plain"
    return Affine(module, qdata.shape, label, 8, (height, width), together, levels, height, width, "qdata", zero=zeros)


def _int4(module: Module, kind: str, data: Mapping[str, Any], block: tuple[int, ...]) -> Encoding:
    module.need("zero_point")
    qdata, scale, zero = (module.specs[part] for part in ("qdata", "scale", "zero_point"))
    shape = (*qdata.shape[:-1], 2 * qdata.shape[-1])
    if qdata.dtype not in ("I8", "U8") or data.get("shape", list(shape)) != list(shape):
        raise module.refuse(f"its qdata is {qdata.dtype} {list(qdata.shape)}, its shape {data.get('shape')!r:.80}")
    wanted = (*shape[:-2], -(-shape[-1] // block[-1]), shape[-2])
    if any(side != 1 for side in block[:-1]) or {scale.shape, zero.shape} != {wanted}:
        raise module.refuse(f"its scale {list(scale.shape)} does not fit blocks of {list(block)} and {list(shape)}")
    if scale.dtype not in dtypes.FLOATS or zero.dtype not in dtypes.FLOATS:
        raise module.refuse(f"its scale is {scale.dtype} and its zero_point {zero.dtype}; floats were expected")
    return Int4(module, shape, f"Int4Tensor, groups of {block[-1]}", 4, (1, block[-1]))


_CLASSES = {"Int8Tensor": _integer, "IntxUnpackedToInt8Tensor": _integer, "Float8Tensor": _float8, "Int4Tensor": _int4}


def _sides(module: Module, shape: tuple[int, ...], block: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """Return rows, of all matrices one below the other, and columns of a block; it must divide the weight."""
    if any(side % n for side, n in zip(shape, block, strict=True)):
        raise module.refuse(f"blocks of {list(block)} do not divide its shape {list(shape)}")
    if scales != tuple(side // n for side, n in zip(shape, block, strict=True)):
        raise module.refuse(f"its scale {list(scales)} does not fit blocks of {list(block)} and {list(shape)}")
    if len(block) == 3 and block[0] > 1 and block != (*shape[:2], block[2]):
        raise module.refuse(f"blocks of {list(block)} go through some of its experts")
    return prod(block[:-1]), block[-1]


class Float8(Fp8):
    """FP8 codes whose name is not the weight's."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name of the weight where it is stored plainly."""
        return self.module.path if len(self.shape) > 2 else f"{self.module.path}.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Integers):
    """Integers, a byte each, with scales and perhaps zero points: W = (q - zero)·scale."""

    scale_part: ClassVar[str] = "scale"
    zero_part: ClassVar[str] = "zero_point"

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return max|w| over half the range; with zero points that are not 0, max - min over the range."""
        lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
        dtype = self.module.specs["scale"].dtype
        least, most = np.float32(self.levels.least), np.float32(self.levels.most)
        zero = self.module.specs.get("zero_point")
        lopsided = zero is not None and bool(parts.whole("zero_point").any())
        span = highs - lows if lopsided else np.maximum(-lows, highs)
        steps = (most - least) / np.float32(1 if lopsided else 2)
        scales = np.maximum(span / steps, np.float32(_LEAST[dtype]))
        kept = as_stored(scales.astype(np.float32), dtype)
        used = numbers(kept, dtype)
        if zero is None:
            return Fit(used, kept)
        zeros = np.clip(least - np.rint(lows / scales), least, most) if lopsided else np.zeros_like(used)
        return Fit(used, kept, zeros)

    def places(self, W: Array, stored: Stored) -> Array:
        """Return W · (1 / scale) + zero, as torchao does: a row's largest number lies between two codes."""
        x = W.copy()
        self.apply(np.multiply, x, np.float32(1) / np.where(stored.scales == 0, np.float32(1), stored.scales))
        if stored.zeros is not None:
            self.apply(np.add, x, stored.zeros)
        return x


@dataclass(frozen=True, slots=True, eq=False)
class Int4(Encoding):
    """4-bit integers, two a byte: W = q·scale + zero."""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q·scale + zero."""
        bytes_ = parts.joined("qdata", first, first + len(out)).view(np.uint8)
        codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(out), -1).view(np.int8)
        out[...] = np.where(codes > 7, codes - 16, codes)
        assert self.group is not None
        for part, operation in (("scale", np.multiply), ("zero_point", np.add)):
            stored = parts.whole(part)
            matrix, row = np.divmod(first + np.arange(len(out)), self.shape[-2])
            of_rows = numbers(stored.reshape(-1, *stored.shape[-2:])[matrix, :, row], self.module.specs[part].dtype)
            operation(out, np.repeat(of_rows, self.group[1], axis=1)[:, : self.columns], out=out)
