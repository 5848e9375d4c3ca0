"""GGUF: the quantized types of ggml, in blocks along the rows; K- and IQ-quants are read, the others written too.

The `gguf` package has the formulas (`gguf.quants`), which are ggml's own, byte for byte. Fresh scales of its types are
a function of the block alone that makes the block's own bytes of the numbers it stands for, so the own grid and a fresh
one are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from loratools.linalg.native import codes as native
from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs.floats import Array
from loratools.storage.gguf import package
from loratools.storage.gguf.types import TYPES, WRITTEN
from loratools.storage.header import TensorSpec

_BYTES = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


def opened(module: Module) -> Encoding:
    """Return how a tensor of a GGUF file is stored."""
    stored = module.specs["weight"]
    return of_type(module, stored.dtype, stored.shape)


def of_type(module: Module, kind: str, shape: tuple[int, ...]) -> Gguf:
    """Return a tensor of this ggml type; `module` has it as its part `weight`, of whatever type."""
    stored, ggml = module.specs["weight"], TYPES[kind]
    try:
        width = ggml.row(shape[-1])
    except ValueError as error:
        raise module.refuse(str(error)) from None
    rows = TensorSpec("U8", (prod(shape[:-1]), width), stored.file, stored.start, stored.stop)
    bits = round(8 * ggml.nbytes / ggml.block)
    return Gguf(replace(module, specs={"weight": rows}), shape, kind, bits, (1, ggml.block), kind=kind)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement as it is: each tensor of a GGUF file has its own type."""
    return dict(statement)


@dataclass(frozen=True, slots=True, eq=False)
class Gguf(Encoding):
    """Blocks of one ggml type; `kind` is its name."""

    kind: str = ""

    @property
    def name(self) -> str:
        """The name of the weight: stacks have it too."""
        return f"{self.module.path}.weight"

    @property
    def dtype(self) -> str:
        """F16, as llama.cpp's own export of a merged model has it."""
        return "F16"

    def written(self) -> Encoding:
        """Return Q8_0 for the types that ggml alone makes."""
        return self if self.kind in WRITTEN else of_type(self.module, "Q8_0", self.shape)

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write what the blocks of these rows stand for."""
        raw = parts.joined("weight", first, first + len(out), lent=True)
        if self.kind == "Q8_0" and _decode_q8_0(raw, out):
            return
        gguf = package()
        with np.errstate(all="ignore"):
            out[...] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Return what makes blocks again; raise `UnsupportedAdapter` for types that ggml alone makes."""
        if self.kind not in WRITTEN:
            raise self.module.refuse(f"{self.kind} is made by ggml alone", "Use --quantized dequantize or partial.")
        if draw is not None:
            raise self.module.refuse("its blocks are not rounded at random", "Use --rounding nearest.")
        return _Encoder(self)


def _decode_q8_0(raw: Array, out: Array) -> bool:
    """Write q·scale of blocks of 32 in C, and return True; False where it is not compiled."""
    split = native.split_blocks(raw)
    return split is not None and native.decode(split[0], "I8", _BYTES, out, scales=split[1], width=32)


class _Encoder:
    """Blocks of one tensor, by gguf's own functions."""

    needs_pass = False

    def __init__(self, encoding: Gguf) -> None:
        gguf = package()
        self._quants, self._type = gguf.quants, gguf.GGMLQuantizationType[encoding.kind]
        rows, columns = prod(encoding.shape[:-1]), encoding.columns
        self._blocks = np.empty((rows, TYPES[encoding.kind].row(columns)), np.uint8)

    def observe(self, first: int, W: Array) -> None:
        """Nothing to see: each block has its own scale."""

    def encode(self, first: int, W: Array) -> Array:
        """Take rows, and return what their blocks stand for."""
        blocks = self._quants.quantize(np.ascontiguousarray(W, np.float32), self._type)
        self._blocks[first : first + len(W)] = blocks
        decoded: Array = self._quants.dequantize(blocks, self._type)
        return decoded

    def finish(self) -> Mapping[str, Array]:
        """Return all blocks."""
        return {"weight": self._blocks}
