"""bitsandbytes: NF4 and FP4 in blocks, with scales that are quantized themselves or not, and LLM.int8 by row.

4 bit: the weight is one flat row of numbers, W = map[code] · absmax[i // blocksize]; its codes lie two a byte, the
first in the high half, in a tensor of any dtype (`bnb_4bit_quant_storage`). With double quantization absmax is codes
too: absmax = nested_map[code] · nested_absmax[i // 256] + offset. Shape, block sizes and offset are JSON in a tensor.

8 bit: W = q · SCB / 127, SCB being a row's largest magnitude in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, isfinite, prod
from typing import Any

import numpy as np

from loratools.decisions import warned
from loratools.errors import BadFile
from loratools.linalg.native import codes as native
from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs._bnb_encoders import FourBitEncoder, TurnedEncoder
from loratools.storage.codecs._bnb_int8 import Int8Encoder, int8_values
from loratools.storage.codecs.floats import Array, narrow, widen
from loratools.storage.codecs.state import listed
from loratools.storage.codecs.tables import numbers
from loratools.storage.codecs.turned import is_turned
from loratools.storage.files import read_bytes
from loratools.storage.strict_json import parse_json_object

_LONGEST_STATE = 1 << 16
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NAMES = {"nf4": "NF4", "fp4": "FP4"}

MAPS: Mapping[str, Array] = {
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
         0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip
"""What a code stands for in a block whose largest magnitude is 1, in the library's files. FP4 has two zeros."""


def opened(module: Module) -> Encoding:
    """Return how a weight of bitsandbytes is stored; raise `UnsupportedAdapter` for one that it does not write."""
    method = str(module.statement.get("quant_method") or "bitsandbytes")
    if method != "bitsandbytes":
        raise module.refuse(f"config.json says {method!r}", "Set quant_method in config.json to what the tensors are.")
    bits = 8 if "SCB" in module.specs else 4
    if module.statement.get(f"load_in_{12 - bits}bit") and not module.statement.get(f"load_in_{bits}bit"):
        raise module.refuse(f"config.json says load_in_{12 - bits}bit", "Correct the quantization in config.json.")
    return _int8(module) if bits == 8 else _four_bit(module)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `llm_int8_skip_modules`, which both 8 and 4 bit read."""
    return {**statement, "llm_int8_skip_modules": listed(statement, "llm_int8_skip_modules", modules)}


def _int8(module: Module) -> Encoding:
    module.need("weight", "SCB")
    weight, scales = module.specs["weight"], module.specs["SCB"]
    if weight.dtype != "I8" or len(weight.shape) != 2 or not weight.parameters:
        raise module.refuse(f"its weight is {weight.dtype} {list(weight.shape)}, and I8 (out, in) was expected")
    if scales.dtype not in ("F32", "F16", "BF16") or scales.shape not in (weight.shape[:1], (weight.shape[0], 1)):
        raise module.refuse(f"its SCB is {scales.dtype} {list(scales.shape)}, and one number a row was expected")
    form = module.specs.get("weight_format")
    if form is not None and (form.nbytes > 8 or any(read_bytes(form))):
        raise module.refuse("its rows are in an order made for one kind of GPU (weight_format is not 0)")
    label = "int8, one scale a row"
    if is_turned(module):
        return Int8(module, weight.shape[::-1], label, 8, (weight.shape[1], 1), 1, True)
    return Int8(module, weight.shape, label, 8, (1, weight.shape[1]))


def _four_bit(module: Module) -> Encoding:
    kind = next((kind for kind in _NAMES if kind in module.specs), None)
    if kind is None:
        raise module.refuse("its quant_state.bitsandbytes__nf4 or __fp4, which has its shape, is missing")
    module.need("weight", "absmax", "quant_map")
    state = _state(module, kind)
    shape, block = tuple(state["shape"]), state["blocksize"]
    total, weight, absmax = prod(shape), module.specs["weight"], module.specs["absmax"]
    blocks = -(-total // block)
    if weight.shape not in ((rows := weight.parameters,), (rows, 1)):
        raise module.refuse(f"its codes are {list(weight.shape)}, and [n, 1] was expected")
    if weight.nbytes != (total + 1) // 2:
        raise module.refuse(f"its weight has {weight.nbytes} bytes of codes, and its state says {list(shape)}")
    nested = "nested_absmax" in module.specs
    if absmax.shape != (blocks,) or absmax.dtype not in (("U8",) if nested else ("F32", "F16", "BF16")):
        raise module.refuse(f"its absmax is {absmax.dtype} {list(absmax.shape)}, and there are {blocks} blocks")
    table, label = _table(module, kind), f"{_NAMES[kind]}, blocks of {block}"
    turned = len(shape) == 2 and is_turned(module)
    facing, group = (shape[::-1], (block, 1)) if turned else (shape, (1, block))
    together = 1 if turned else _together(shape, block)
    if not nested:
        return FourBit(module, facing, label, 4, group, together, kind, table, block, turned)
    size, offset = state.get("nested_blocksize") or 0, state.get("nested_offset") or 0
    if type(size) is not int or size < 1 or type(offset) not in (int, float) or not isfinite(offset):
        raise module.refuse(f"its state says nested_blocksize {size!r:.40} and nested_offset {offset!r:.40}")
    scales = module.specs["nested_absmax"]
    if scales.shape != (-(-blocks // size),) or scales.dtype != "F32":
        raise module.refuse(f"its nested_absmax is {scales.dtype} {list(scales.shape)}, and absmax has {blocks} codes")
    _map(module, "nested_quant_map", 256)
    label = f"{label}, double quantization"
    return FourBit(module, facing, label, 4, group, together, kind, table, block, turned, size, float(offset))


def _together(shape: tuple[int, ...], block: int) -> int:
    """Return after how many rows a block ends where a row does; all where that is nowhere else."""
    return min(block // gcd(block, shape[-1]), prod(shape[:-1]))


def _state(module: Module, kind: str) -> dict[str, Any]:
    """Return what the JSON of a module says, of which shape, block size and type are checked."""
    spec = module.specs[kind]
    if spec.dtype != "U8" or spec.nbytes > _LONGEST_STATE:
        raise module.refuse(f"its quant_state is {spec.dtype} {list(spec.shape)}, and some bytes of JSON were expected")
    try:
        state = parse_json_object(bytes(read_bytes(spec)).strip(), spec.file)
    except BadFile as error:
        raise module.refuse(f"its quant_state is damaged: {error}") from None
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or any(type(n) is not int or n < 1 for n in shape):
        raise module.refuse(f"its quant_state says shape {shape!r:.80}")
    if type(block) is not int or block not in _BLOCKS:
        raise module.refuse(f"its quant_state says blocksize {block!r:.40}")
    if state.get("quant_type") != kind:
        raise module.refuse(f"its quant_state says quant_type {state.get('quant_type')!r:.40}, not {kind}")
    return state


def _table(module: Module, kind: str) -> Array:
    """Return what a code of 4 bits stands for: the file's numbers, which are those of `MAPS` in all but odd files.

    A table in 16 bit that is the library's, rounded, is read as the library's. Raises `UnsupportedAdapter` for a table
    by which codes cannot be told apart.
    """
    table, usual = _map(module, "quant_map", 16), MAPS[kind]
    rounded = (widen(narrow(usual, dtype), dtype, np.float32) for dtype in ("F16", "BF16"))
    if np.allclose(table, usual, rtol=0, atol=1e-6) or any(np.array_equal(table, other) for other in rounded):
        return usual
    if len(np.unique(table)) < len(np.unique(usual)):
        raise module.refuse("its quant_map has one number for several codes")
    warned(
        "%s weights come with a quant_map that is not that of %s; they are read by it, as the file says. "
        "bitsandbytes itself computes with the numbers of %s, whatever the file says",
        f"bitsandbytes {_NAMES[kind]}", _NAMES[kind], _NAMES[kind],
    )  # fmt: skip
    return table


def _map(module: Module, part: str, count: int) -> Array:
    """Return a map of codes; raise `UnsupportedAdapter` unless it has `count` finite numbers in float32."""
    module.need(part)
    spec = module.specs[part]
    if spec.shape != (count,) or spec.dtype not in ("F32", "F16", "BF16"):
        raise module.refuse(f"its {part} is {spec.dtype} {list(spec.shape)}, and {count} numbers were expected")
    found = numbers(module.read(part), spec.dtype)
    if not np.isfinite(found).all():
        raise module.refuse(f"its {part} has numbers that are not finite")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class FourBit(Encoding):
    """4-bit codes of `table`, in blocks of `block`; codes of scales in blocks of `nested`, around `offset`.

    `kind` is the part that has the state, nf4 or fp4. `turned` says that the codes are those of the weight transposed.
    """

    kind: str = "nf4"
    table: Array = field(default_factory=lambda: MAPS["nf4"])
    block: int = 64
    turned: bool = False
    nested: int | None = None
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The name under which the codes lie, which is the weight's."""
        return self.module.names["weight"]

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write map[code] · absmax of the block."""
        if self.turned:
            self._decode_columns(parts, first, out)
            return
        start, stop = first * self.columns, first * self.columns + out.size
        left, right = start // self.block, -(-stop // self.block)
        last = min(right * self.block, prod(self.shape))
        direct = (left * self.block, right * self.block) == (start, stop) and out.flags.c_contiguous
        flat = out.reshape(-1) if direct else np.zeros((right - left) * self.block, np.float32)
        stored = parts.raw("weight", left * self.block // 2, (last + 1) // 2, lent=True)
        blocks, scales = flat.reshape(-1, self.block), self.scales(parts, left, right)[:, None]
        rows = stored.reshape(-1, self.block // 2) if last == right * self.block else None
        if rows is None or not native.decode(rows, "high first", self.table, blocks, scales=scales):
            pairs = flat.view(np.complex64)[: len(stored)]
            np.take(_pairs(self.table), stored, out=pairs, mode="clip")
            blocks *= scales
        if not direct:
            skipped = start - left * self.block
            out[...] = flat[skipped : skipped + out.size].reshape(out.shape)

    def _decode_columns(self, parts: Parts, first: int, out: Array) -> None:
        """Write the same of columns of the codes, all of which are held."""
        places = np.arange(self.columns)[:, None] * self.shape[0] + np.arange(first, first + len(out))
        shifted = parts.whole("weight").reshape(-1).view(np.uint8)[places >> 1] >> np.where(places & 1, 0, 4)
        scales = self.scales(parts, 0, self._blocks)[places // self.block]
        out[...] = (self.table[shifted & 15] * scales).T

    @property
    def _blocks(self) -> int:
        return -(-prod(self.shape) // self.block)

    def scales(self, parts: Parts, start: int, stop: int) -> Array:
        """Return the scales of blocks [`start`, `stop`)."""
        if self.nested is None:
            return parts.numbers("absmax", start, stop)
        nested = parts.whole("nested_absmax")[np.arange(start, stop) // self.nested]
        scales: Array = parts.constants("nested_quant_map")[parts.rows("absmax", start, stop)] * nested
        scales += np.float32(self.offset)
        return scales

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Return what makes codes again: on the scales that it has, or on new ones, as `quantize_4bit` makes them.

        A block whose numbers have grown beyond its scale gets a new one on either grid.

        New scales are those of the library for the same float32 weight, bit for bit; only the mean of the scales, which
        double quantization takes off, is rounded from float64, where the library adds in float32.
        """
        shape = self.shape[::-1] if self.turned else self.shape
        scales, levels = self.scales(parts, 0, self._blocks), self.table
        encoder = FourBitEncoder(
            self.module, parts, levels, shape[-1], self.block, scales, self.nested, self.offset, self.kind, grid, draw
        )
        return TurnedEncoder(encoder, (shape[0], shape[1]), _together(shape, self.block)) if self.turned else encoder


def _pairs(table: Array) -> Array:
    """Return the two numbers of every byte, side by side in one complex number: they are copied as one."""
    codes = np.arange(256)
    return np.stack([table[codes >> 4], table[codes & 15]], axis=1).reshape(-1).view(np.complex64)


@dataclass(frozen=True, slots=True, eq=False)
class Int8(Encoding):
    """8-bit codes, and a scale a row; `turned` says that they are those of the weight transposed."""

    turned: bool = False

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q · SCB / 127, in the library's order."""
        stop = first + len(out)
        if self.turned:
            codes = parts.whole("weight")[:, first:stop]
            out[...] = int8_values(codes, parts.numbers("SCB").reshape(-1, 1)).T
            return
        out[...] = int8_values(
            parts.rows("weight", first, stop).view(np.int8), parts.numbers("SCB", first, stop).reshape(-1, 1)
        )

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Return what makes codes again: by the SCB that it has, or by a new one of the weight in float16."""
        encoder = Int8Encoder(self.module, parts, parts.numbers("SCB").reshape(-1).copy(), grid, draw)
        return TurnedEncoder(encoder, (self.shape[1], self.shape[0]), 1) if self.turned else encoder
