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
from loratools.linalg.native import codes as native
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._groups import Fit, Packed
from loratools.storage.codecs._levels import Whole
from loratools.storage.codecs._packed import pack, unpack, words, words_of
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs._transposed import Transposed, check_parts
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import by_module, listed
from loratools.storage.codecs.tables import numbers
from loratools.storage.dtypes import bits as bits_of

_BITS = (2, 3, 4, 8)
_WORDS = frozenset({"I32", "U32", "I64", "U64", "I16", "U16", "I8", "U8"})
_V1 = frozenset({"gptq", "auto_round:auto_gptq", "auto_round:gptq", "auto_gptq"})
_OTHERS = ("fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes", "hqq")
"""Methods whose codes are none of GPTQ's: config.json names another model's."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def opened(module: Module) -> Encoding:
    """Return how a GPTQ weight is stored; raise `UnsupportedAdapter` where its parts, or config.json, do not agree."""
    check_parts(module)
    if (method := module.statement.get("quant_method")) in _OTHERS:
        raise module.refuse(f"config.json says {method!r}", "Set quant_method in config.json to what the tensors are.")
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
    if not columns:
        raise module.refuse(f"it has no columns: {shapes}")
    size = _group_size(module, columns, groups, overrides)
    label = f"GPTQ {bits} bit, " + ("one group a row" if groups == 1 else f"groups of {size}")
    return Gptq(
        module, (rows, columns), label, bits, (1, size), levels=Whole(bits), width=size, codes_part="qweight",
        columns_of=_order(module, columns, groups, size), offset=_offset(module),
    )  # fmt: skip


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
    plainly = listed(statement, "modules_to_not_convert", modules)
    return {**statement, "dynamic": {**left, **by_module(statement, "dynamic")}, "modules_to_not_convert": plainly}


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


def _order(module: Module, columns: int, groups: int, size: int) -> Array | None:
    """Return the group of each column as g_idx has it; None where groups follow each other.

    Raises `UnsupportedAdapter` for groups that there are not, and for an order of which config.json says that it is
    none: loaders read such a file in two ways.
    """
    if "g_idx" not in module.specs:
        if module.statement.get("desc_act") is True and groups > 1:
            raise module.refuse("config.json says desc_act true, and the g_idx that orders its columns is missing")
        return None
    of_column = module.read("g_idx").astype(np.int64)
    if np.array_equal(of_column, np.arange(columns) // size):
        return None
    if not np.array_equal(np.unique(of_column), np.arange(groups)):
        raise module.refuse(f"its g_idx does not name each of the {groups} groups that it has, and no others")
    if module.statement.get("desc_act") is False and not module.statement.get("dynamic"):
        raise module.refuse("its g_idx orders columns, and config.json says desc_act false")
    return of_column


@dataclass(frozen=True, slots=True, eq=False)
class Gptq(Transposed):
    """Codes packed along the columns; `offset` is added to stored zero points."""

    offset: int = 1

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed:
        """Return so many rows from `first` on, which are columns of what is stored."""
        words = parts.whole("qweight")
        octets = native.turned(words, first, count)
        if octets is None:
            octets = np.ascontiguousarray(words[:, first : first + count].T).view(np.uint8).reshape(count, -1)
        return Packed(octets, self.bits, self.scales(parts, first, count), self._zeros(parts, first, count))

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return (max − min) / (2^bits − 1) and the zero point that goes with it, in the dtype of the scales.

        As GPTQModel's plain rounding to the nearest has it, where it does not look at activations; rows are symmetric
        where config.json says so. v1 cannot store the zero point 0, and gets 1.
        """
        lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
        top = np.float32((1 << self.bits) - 1)
        symmetric = self.module.statement.get("sym") is True
        if symmetric:
            highs = np.maximum(-lows, highs)
            lows = -highs
        elif self.offset:
            lows = np.minimum(lows, -highs / (top - 1))
        step = np.where(highs == lows, np.float32(1), highs - lows) / top
        dtype = self.module.specs["scales"].dtype
        kept = as_stored(step, dtype)
        half = self.levels.least
        zeros = np.zeros_like(step) if symmetric else np.clip(np.rint(-lows / step), self.offset, top) + half
        return Fit(numbers(kept, dtype), kept, zeros.astype(np.float32))

    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes."""
        qweight = self.module.specs["qweight"]
        return pack(codes, self.bits, qweight.shape[0] * bits_of(qweight.dtype) // 8)

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, scales and zero points transposed, as they are stored."""
        specs = self.module.specs
        words = np.ascontiguousarray(packed.view(words_of(specs["qweight"].dtype)).T)
        parts = {"qweight": words, **self.new_scales(fit)}
        if fit is not None and fit.zeros is not None:
            mask = (1 << self.bits) - 1
            codes = (fit.zeros.T.astype(np.int16) - int(self.levels.least) - self.offset) & mask
            width = specs["qzeros"].shape[1] * bits_of(specs["qzeros"].dtype) // 8
            parts["qzeros"] = pack(codes.astype(np.uint8), self.bits, width).view(words_of(specs["qzeros"].dtype))
        return parts

    def _zeros(self, parts: Parts, first: int, count: int) -> Array:
        """Return the zero points of so many rows as levels, float32 (count, groups)."""
        packed = parts.whole("qzeros")
        each = 8 * self.bits // packed.itemsize  # words of 64 codes
        start, stop = first // 64, -(-(first + count) // 64)
        last = min(stop * 64, self.shape[0])
        stored = unpack(packed[:, start * each : stop * each], self.bits, last - start * 64)[:, first - start * 64 :]
        stored, top = stored[:, :count], (1 << self.bits) - 1
        if self.offset and (stored == top).any():
            raise self.module.refuse(
                f"a zero point is stored as {top}, and its format stores each less one: vLLM reads {top + 1}, "
                "AutoGPTQ 0, and GPTQModel adds the one to the whole word, which changes the zero point beside it"
            )
        return np.ascontiguousarray(stored.T).astype(np.float32) + np.float32(self.offset + self.levels.least)
