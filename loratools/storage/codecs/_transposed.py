"""Codes that lie transposed, with scales and zero points for groups of columns, as AWQ and GPTQ store them.

A row of the weight is a column of `qweight`, of `scales` (groups, out) and of `qzeros`; how codes lie in words differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loratools.storage.codecs import Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import numbers
from loratools.storage.codecs.turned import is_turned


def check_parts(module: Module) -> None:
    """Raise `UnsupportedAdapter` where a part is missing, and for a weight that is [in, out] where it is plain."""
    module.need("qweight", "qzeros", "scales")
    if is_turned(module):
        raise module.refuse("its plain weight is stored [in, out], as GPT-2's, and its codes are not turned")


@dataclass(frozen=True, slots=True, eq=False)
class Transposed(Grouped):
    """Codes in groups whose scales lie transposed."""

    scale_part: ClassVar[str] = "scales"

    def scales(self, parts: Parts, first: int, count: int) -> Array:
        """Return the scales of so many rows from `first` on, float32 (count, groups)."""
        columns = parts.whole("scales")[:, first : first + count]
        return np.ascontiguousarray(numbers(columns, self.module.specs["scales"].dtype).T)

    def kept(self, parts: Parts) -> Array:
        """Return all scales as they are stored, turned to (rows, groups), the form of `Fit.kept`."""
        return parts.whole("scales").T

    def new_scales(self, fit: Fit | None) -> dict[str, Array]:
        """Return the scales as they are stored, where they are new; else nothing."""
        return {} if fit is None else {"scales": np.ascontiguousarray(fit.kept.T)}
