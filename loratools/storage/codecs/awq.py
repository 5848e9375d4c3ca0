"""AWQ in its GEMM layout: 4 bit codes with a scale and a zero point for each group of columns, stored transposed.

W[n, k] = (q[k, n] − z[g, n]) · scales[g, n], g = k // group_size. `qweight` (in, out / 8) and `qzeros`
(groups, out / 8) hold eight rows of the weight in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7; zero points are stored
as they are. AWQ moves a part of the weights into the norms before them: W is that of the model in another basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._packed import unpack
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import numbers

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds row 0, 1, 2, … of its eight."""


def opened(module: Module) -> Encoding:
    """Return how an AWQ weight is stored; raise `UnsupportedAdapter` for another layout than GEMM, or other bits."""
    module.need("qweight", "qzeros", "scales")
    statement, specs = module.statement, module.specs
    _check_layout(module)
    qweight, qzeros, scales = (specs[part] for part in ("qweight", "qzeros", "scales"))
    shapes = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
    if {qweight.dtype, qzeros.dtype} - {"I32", "U32"} or scales.dtype not in ("F16", "BF16", "F32"):
        raise module.refuse(f"its parts are {qweight.dtype}, {qzeros.dtype} and {scales.dtype}, no words and floats")
    if not all(len(spec.shape) == 2 for spec in (qweight, qzeros, scales)):
        raise module.refuse(f"its parts have not the sides of a matrix: {shapes}")
    (columns, _), (groups, rows) = qweight.shape, scales.shape
    if qweight.shape[1] * 8 != rows or qzeros.shape != (groups, rows // 8) or not groups or columns % groups:
        raise module.refuse(f"its parts do not fit each other in 4 bits: {shapes}")
    size, stated = columns // groups, statement.get("group_size", statement.get("q_group_size"))
    whole = groups == 1 and stated in (-1, 0)
    if isinstance(stated, int) and stated != size and not whole and not statement.get("extra_config"):
        raise module.refuse(f"config.json says groups of {stated}, its tensors have {size}: {shapes}")
    label = "AWQ 4 bit, " + ("one group a row" if groups == 1 else f"groups of {size}")
    return Awq(module, (rows, columns), label, 4, (1, size), 8)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `modules_to_not_convert`."""
    return {**statement, "modules_to_not_convert": [*(statement.get("modules_to_not_convert") or ()), *modules]}


def _check_layout(module: Module) -> None:
    """Raise `UnsupportedAdapter` for gemv, gemv_fast, llm-awq and any other layout than GEMM, and for other bits."""
    statement = module.statement
    keys = ("version", "format", "checkpoint_format")
    layouts = {str(statement[key]).lower() for key in keys if statement.get(key)}
    layouts |= {"llm-awq"} & {str(statement.get("backend")).lower()}
    if other := layouts - {"gemm"}:
        raise module.refuse(f"its layout is {', '.join(sorted(other))}, of which only gemm is read")
    bits = statement.get("bits", statement.get("w_bit", 4))
    if bits != 4 and not statement.get("extra_config"):
        raise module.refuse(f"it has {bits} bits, and the layout is known for 4")


@dataclass(frozen=True, slots=True, eq=False)
class Awq(Encoding):
    """Nibbles of eight rows in a word."""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write (q − z) · scales."""
        count = len(out)
        assert self.group is not None
        scales = numbers(parts.whole("scales")[:, first : first + count], self.module.specs["scales"].dtype).T
        zeros = _rows(parts.whole("qzeros"), first, count).astype(np.float32)
        target = out if out.flags.c_contiguous else np.empty_like(out, order="C")
        np.copyto(target, _rows(parts.whole("qweight"), first, count))
        blocks = target.reshape(count, -1, self.group[1])
        blocks -= zeros[:, :, None]
        blocks *= scales[:, :, None]
        if target is not out:
            np.copyto(out, target)


def _rows(packed: Array, first: int, count: int) -> Array:
    """Return rows of codes, uint8 (count, n), of words that lie transposed, (n, rows / 8)."""
    start, stop = first // 8, -(-(first + count) // 8)
    codes = unpack(packed[:, start:stop], 4, 8 * (stop - start)).reshape(len(packed), -1, 8)[..., _ORDER]
    return codes.reshape(len(packed), -1).T[first - 8 * start :][:count]
