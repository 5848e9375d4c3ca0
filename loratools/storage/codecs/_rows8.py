"""8-bit integers by row, as modelopt stores them: W = q·scale, scale = max|w| / 127."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit, Packed
from loratools.storage.codecs._levels import Whole
from loratools.storage.codecs._scales import read_back
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs.floats import Array


@dataclass(frozen=True, slots=True, eq=False)
class Rows8(Grouped):
    """Bytes in two's complement with a scale for each row."""

    @classmethod
    def of(cls, module: Module) -> Encoding:
        """Return how a module is stored; raise `UnsupportedAdapter` for scales that are not one a row."""
        weight, scale = module.specs["weight"], module.specs["weight_scale"]
        if scale.dtype not in dtypes.FLOATS or scale.shape not in (weight.shape[:-1], (*weight.shape[:-1], 1)):
            raise module.refuse(
                f"its weight {list(weight.shape)} and weight_scale {scale.dtype} {list(scale.shape)} do not fit"
            )
        columns = weight.shape[-1]
        levels = Whole(8, bytes=True)
        label = "8-bit integers, one scale a row"
        return cls(module, weight.shape, label, 8, (1, columns), 1, levels, 1, columns, "weight")

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed:
        """Return codes and scales of rows."""
        codes = parts.joined("weight", first, first + count, lent=True).view(np.uint8)
        return Packed(codes, 8, parts.constants("weight_scale").reshape(-1, 1)[first : first + count])

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return max|w| / 127, 1 for zeros."""
        dtype = self.module.specs["weight_scale"].dtype
        scales = np.maximum(-lows, highs) / np.float32(127)
        scales = np.where(scales == 0, np.float32(1), scales)
        return Fit(read_back(scales, dtype), as_stored(scales, dtype))

    def kept(self, parts: Parts) -> Array:
        """Return all scales as they are stored, in the form of `Fit.kept`."""
        return parts.whole("weight_scale").reshape(-1, 1)

    def packed(self, codes: Array) -> Array:
        """Return rows of codes, which are bytes."""
        return codes

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, and scales where they are new."""
        specs = self.module.specs
        made = {"weight": packed.view(np.int8).reshape(specs["weight"].shape)}
        return made | ({} if fit is None else {"weight_scale": fit.kept.reshape(specs["weight_scale"].shape)})
