"""The original's weights in the basis of a folded base, for a base that is quantized anew from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loratools.storage import codecs, dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs.floats import Array
from loratools.storage.header import TensorSpec
from loratools.surgery.folding.scales import Scales


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scaled(Encoding):
    """A plain weight read as diag(1/rows)·W·diag(columns), by scales that are worked out when they are asked for."""

    scales: Scales

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write rows of the weight, multiplied in float64 and rounded once."""
        W = parts.numbers("weight", first, first + len(out)).astype(np.float64)
        rows, columns = self.scales.rows(self.module.path), self.scales.columns(self.module.path)
        W = W if columns is None else W * columns
        out[:] = W if rows is None else W / rows[first : first + len(out), None]


def in_basis(scales: Scales) -> Checkpoint:
    """Return the original under the base's names, with each matrix that is folded in the base as it would be there.

    Tensors that the base does not fold, and those that are codes in the original too, stay as they are.
    """
    specs: dict[str, TensorSpec] = dict(scales.original.specs)
    for name, of_base in scales.base.specs.items():
        path, _, parameter = name.rpartition(".")
        spec = scales.of_original(name)
        if spec is None or parameter != "weight" or len(of_base.shape) != 2 or spec.shape != of_base.shape:
            continue
        if spec.encoding or spec.dtype not in dtypes.FLOATS or not scales.concerns(path):
            continue
        module = Module(path, "the original's basis", {"weight": name}, {"weight": spec}, {}, spec.dtype)
        specs[name] = codecs.encoded(Scaled(module, spec.shape, "folded", 16, scales=scales))
    return replace(scales.original, specs=specs)
