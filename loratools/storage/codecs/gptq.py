"""GPTQ: integers of 2, 3, 4 or 8 bits with a scale and a zero point for each group of columns, stored transposed.

W[n, k] = scales[g, n] · (q[k, n] − z[g, n]), g = g_idx[k], or k // group_size where there is no g_idx. `qweight`
(words, out) is packed along its columns, `qzeros` (groups, words) along its rows. Files of the format `gptq` (v1, and
those whose config.json names none) store z − 1 modulo 2^bits, files of `gptq_v2` store z. What a module has of bits
and groups is read from its tensors, for `dynamic` gives single modules others than config.json says of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.decisions import warned
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._packed import unpack, words
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import numbers
from loratools.storage.dtypes import bits as bits_of

_BITS = (2, 3, 4, 8)
_WORDS = frozenset({"I32", "U32", "I64", "U64", "I16", "U16", "I8", "U8"})
_V1 = frozenset({"gptq", "auto_round:auto_gptq", "auto_round:gptq", "auto_gptq"})
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def opened(module: Module) -> Encoding:
    """Return how a GPTQ weight is stored; raise `UnsupportedAdapter` where its parts, or config.json, do not agree."""
    module.need("qweight", "qzeros", "scales")
    statement, specs = module.statement, module.specs
    qweight, qzeros, scales, g_idx = (specs.get(part) for part in ("qweight", "qzeros", "scales", "g_idx"))
    assert qweight
    assert qzeros
    assert scales
    shapes = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
    if not all(len(spec.shape) == 2 for spec in (qweight, qzeros, scales)) or (g_idx and len(g_idx.shape) != 1):
        raise module.refuse(f"its parts have not the sides of a matrix: {shapes}")
    if qweight.dtype not in _WORDS or qzeros.dtype not in _WORDS or scales.dtype not in ("F16", "BF16", "F32"):
        raise module.refuse(f"its parts are {qweight.dtype}, {qzeros.dtype} and {scales.dtype}, no words and floats")
    if g_idx and g_idx.dtype not in ("I32", "I64"):
        raise module.refuse(f"its g_idx is {g_idx.dtype}")
    groups, rows = scales.shape
    if qweight.shape[1] != rows or qzeros.shape[0] != groups or not groups or not rows:
        raise module.refuse(f"its parts do not fit each other: {shapes}")
    bits = _bits(module, shapes)
    columns = g_idx.shape[0] if g_idx else qweight.shape[0] * bits_of(qweight.dtype) // bits
    overrides = bool(statement.get("dynamic") or statement.get("extra_config"))
    size = _group_size(module, columns, groups, overrides)
    label = f"GPTQ {bits} bit, " + ("one group a row" if groups == 1 else f"groups of {size}")
    return Gptq(module, (rows, columns), label, bits, (1, size), 1, _offset(module))


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules left out by `dynamic`, which GPTQModel and vLLM read.

    `modules_to_not_convert` has them too, for AutoRound. optimum, by which transformers loads GPTQ, reads neither.
    """
    warned(
        "the modules that are 16 bit now stand in `dynamic` of config.json, which vLLM and GPTQModel read; "
        "transformers with optimum has no way to leave out single modules of a GPTQ model"
    )
    names = list(modules)
    for fused, members in _FUSED.items():  # the names by which vLLM asks
        parents = [name.removesuffix(members[0]) for name in modules if name.endswith(f".{members[0]}")]
        names += [start + fused for start in parents if all(start + member in modules for member in members)]
    left: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in names}
    others = statement.get("dynamic") or {}
    listed = [*(statement.get("modules_to_not_convert") or ()), *modules]
    return {**statement, "dynamic": {**left, **others}, "modules_to_not_convert": listed}


def _bits(module: Module, shapes: str) -> int:
    """Return the bits of a code by which all parts fit each other, config.json's where several do."""
    specs, stated = module.specs, module.statement.get("bits")
    qweight, qzeros = specs["qweight"], specs["qzeros"]
    columns = specs["g_idx"].shape[0] if "g_idx" in specs else None

    def fits(bits: int) -> bool:
        if words(specs["scales"].shape[1], bits, bits_of(qzeros.dtype)) != qzeros.shape[1]:
            return False
        return columns is None or words(columns, bits, bits_of(qweight.dtype)) == qweight.shape[0]

    fitting = [bits for bits in _BITS if fits(bits)]
    if stated in fitting:
        return int(stated)
    if len(fitting) != 1:
        raise module.refuse(f"its parts do not tell how many bits, {stated} by config.json, a code has: {shapes}")
    if stated is not None and not (module.statement.get("dynamic") or module.statement.get("extra_config")):
        raise module.refuse(f"config.json says {stated} bits, its tensors have {fitting[0]}: {shapes}")
    return fitting[0]


def _group_size(module: Module, columns: int, groups: int, overrides: bool) -> int:
    """Return the columns of a group: config.json's where it fits, else, where modules may differ, what divides."""
    stated = module.statement.get("group_size")
    if groups == 1:
        return columns
    if isinstance(stated, int) and stated > 0 and -(-columns // stated) == groups:
        return stated
    if (stated is None or overrides) and columns % groups == 0:
        return columns // groups
    raise module.refuse(
        f"its {groups} groups do not fit {columns} columns and the group_size {stated!r} of config.json"
    )


def _offset(module: Module) -> int:
    """Return what is added to a stored zero point; raise `UnsupportedAdapter` for another format."""
    keys = ("checkpoint_format", "format", "packing_format")
    stated = {str(module.statement[key]).lower() for key in keys if module.statement.get(key)}
    if not stated <= _V1 | {"gptq_v2"} or len({name in _V1 for name in stated}) > 1:
        raise module.refuse(f"its format is {', '.join(sorted(stated))}, of which only gptq and gptq_v2 are read")
    return 0 if "gptq_v2" in stated else 1


@dataclass(frozen=True, slots=True, eq=False)
class Gptq(Encoding):
    """Codes packed along the columns; `offset` is added to stored zero points."""

    offset: int = 1

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write scales · (q − z)."""
        count = len(out)
        np.copyto(out, unpack(parts.whole("qweight")[:, first : first + count].T, self.bits, self.columns))
        scales = numbers(parts.whole("scales")[:, first : first + count], self.module.specs["scales"].dtype).T
        zeros = self.zeros(parts, first, count).T.astype(np.float32)
        of_column = self.groups(parts)
        size = self.group[1] if self.group else self.columns
        if of_column is None and out.flags.c_contiguous and size * scales.shape[1] == self.columns:
            blocks = out.reshape(count, -1, size)
            blocks -= zeros[:, :, None]
            blocks *= scales[:, :, None]
            return
        if of_column is None:
            of_column = np.arange(self.columns) // size
        out -= zeros[:, of_column]
        out *= scales[:, of_column]

    def zeros(self, parts: Parts, first: int, count: int) -> Array:
        """Return the zero points of so many rows of the weight, uint8 (groups, count)."""
        packed = parts.whole("qzeros")
        each = 64 * self.bits // (8 * packed.itemsize)  # words of 64 codes
        start = first // 64
        stop = -(-(first + count) // 64)
        stored = unpack(packed[:, start * each : stop * each], self.bits, min(stop * 64, self.shape[0]) - start * 64)
        mask = np.uint8((1 << self.bits) - 1)
        return (stored[:, first - start * 64 :][:, :count] + np.uint8(self.offset)) & mask

    def groups(self, parts: Parts) -> Array | None:
        """Return the group of each column; None where they follow each other.

        Raises `UnsupportedAdapter` for groups that there are not, and for an order of which config.json says that it
        is none: loaders read such a file in two ways.
        """
        if "g_idx" not in self.module.specs:
            return None
        of_column = parts.whole("g_idx").astype(np.int64)
        groups = self.module.specs["scales"].shape[0]
        if of_column.min(initial=0) < 0 or of_column.max(initial=0) >= groups:
            raise self.module.refuse(f"its g_idx names groups beyond the {groups} that it has")
        size = self.group[1] if self.group else self.columns
        if np.array_equal(of_column, np.arange(self.columns) // size):
            return None
        if self.module.statement.get("desc_act") is False and groups > 1:
            raise self.module.refuse("its g_idx orders columns, and config.json says desc_act false")
        return of_column
