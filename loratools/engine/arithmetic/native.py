"""Products on rows of BF16, F16 and F32, as LoRA and DoRA are, in one pass of C (`linalg/native`) and without torch.

What codes stand for comes as F32 and is rounded to 16 bit in that pass, changed or not. Where the file has the numbers
themselves, `passed.py` does the same without their coming by Python.

Importing torch takes longer than merging a model of a billion parameters, so what most people merge does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapter.placement.resolve import Placement
from loratools.engine.load import SiteProduct, is_stored, is_wide
from loratools.engine.plan import Change
from loratools.engine.task import Changed, TensorTask, near_zero, not_finite
from loratools.linalg import native
from loratools.storage import dtypes

if TYPE_CHECKING:
    import numpy as np

    from loratools.storage.codecs import floats

    Array = np.ndarray[Any, np.dtype[Any]]


def serves(change: Change, dtype: str) -> bool:
    """Tell whether the C code is there, and made for this tensor: stored products on a dtype that it knows and keeps.

    A weight that is stored as codes may become any of these dtypes, with products or without.
    A kind with magnitudes (DoRA) must have one for each row of its site.
    """
    coded = change.source.encoding is not None
    return (
        (coded or (bool(change.placements) and change.source.dtype == dtype))
        and {change.source.dtype, dtype} <= dtypes.ROW_DTYPES
        and all(_is_product_of_rows(placement) for _, placement in change.placements)
        and not is_wide(change, dtype)
        and native.available()
    )


def _is_product_of_rows(placement: Placement) -> bool:
    factors = placement.update.factored()
    across = factors is not None and factors.magnitude is not None and (placement.site.transposed or factors.by_column)
    return is_stored(factors) and not across


class _Site:
    """The product of a site, arranged for the C code once."""

    def __init__(self, product: SiteProduct, dtype: str) -> None:
        import numpy as np

        with np.errstate(over="ignore"):  # what overflows shows in the sums, and is refused there
            left = (product.factor * product.scale).astype(np.float32)
            bound = float(np.linalg.norm(left, axis=1).max() * np.linalg.norm(product.right, axis=0).max())
        self.site = product.site
        self.products = native.products(left, product.right, product.factor, product.scale, product.magnitude)
        self.bound = bound * (near_zero(dtype) or 0.0)
        self.gains = None if product.magnitude is None else np.zeros_like(product.magnitude)


class NativeRows:
    """The tiles of one tensor in C. Its sites do not meet: `serves` says so."""

    together = 1
    needs_pass = False

    def __init__(self, task: TensorTask, products: Sequence[SiteProduct], buffers: floats.Buffers) -> None:
        from loratools.storage.codecs import floats

        self._task, self._buffers = task, buffers
        self._stored, self._out = (floats.numpy_dtype(dtype) for dtype in (task.source.dtype, task.dtype))
        self._narrows = self._stored != self._out
        self._sites = [_Site(product, task.dtype) for product in products]
        covered = sum(site.site.shape[0] * site.site.shape[1] for site in self._sites)
        self._everywhere = bool(products) and covered == task.source.parameters

    def room(self, rows: int) -> memoryview:
        """Return memory for a tile of so many rows as stored."""
        from loratools.storage.codecs.floats import bytes_of

        return bytes_of(self._buffers.of("stored", rows * self._task.matrix[1], self._stored))

    def observe(self, stored: memoryview, first: int) -> None:
        """Nothing to see: each row has all that its results take."""

    def change(self, stored: memoryview, first: int, measured: int) -> Changed:
        """Return the tile changed. Raises `IncompatibleAdapter` for what is not finite, or a row without direction."""
        import numpy as np

        from loratools.storage.codecs import floats

        W = np.frombuffer(stored, self._stored).reshape(-1, self._task.matrix[1])
        if not self._sites and not self._narrows:
            return Changed(stored, 0.0, 0.0, 0)
        out = self._buffers.of("out", W.size, self._out).reshape(W.shape)
        largest, retained, total, changed, overflowed, flushed = 0, 0.0, 0.0, 0, 0, 0
        if not self._everywhere:
            largest, overflowed, flushed = self._keep(W, out)
        for place in self._sites:
            if not (met := place.site.overlap(first, first + len(W))):
                continue
            inside = (met[0], slice(*place.site.columns))
            if self._narrows and not self._everywhere:  # of these numbers the sums count, not what was there
                before = native.round_rows(W[inside], out[inside])
                overflowed, flushed = overflowed - before.overflowed, flushed - before.flushed
            outcome = native.add_products(
                W[inside], out[inside], place.products, met[1],
                self._buffers.of("sums", place.products.memory, np.float32),
                gains=place.gains, bound=place.bound, measured=len(range(*met[0].indices(measured))),
            )  # fmt: skip
            if outcome.zero_row is not None:
                from loratools.adapter.kinds.dora import no_direction

                raise no_direction(place.site, outcome.zero_row)
            largest = max(largest, outcome.largest)
            retained, total = retained + outcome.retained, total + outcome.total
            changed += outcome.changed
            overflowed, flushed = overflowed + outcome.overflowed, flushed + outcome.flushed
        if self._sites and largest >= dtypes.INFINITY[self._task.dtype]:
            raise not_finite(self._task.name, self._task.dtype)
        return Changed(floats.bytes_of(out), retained, total, changed, overflowed, flushed)

    def _keep(self, W: Array, out: Array) -> tuple[int, int, int]:
        """Store a tile as it is; return the bits of the largest magnitude, and how many overflowed and were flushed."""
        if self._narrows:
            outcome = native.round_rows(W, out)
            return outcome.largest, outcome.overflowed, outcome.flushed
        from loratools.storage.codecs import floats

        out[...] = W
        return floats.largest(W, self._buffers), 0, 0
