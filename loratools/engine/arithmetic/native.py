"""A tile of a tensor to which products are added, in one pass of C (`linalg/native`): `numpy.py` takes ten."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds.dora import no_direction
from loratools.engine.arithmetic.numpy import check_finite, near_zero
from loratools.engine.arithmetic.sums import RescaledSum
from loratools.engine.tensor import TensorResult
from loratools.linalg import native
from loratools.storage.codecs import floats

if TYPE_CHECKING:
    import numpy as np

    from loratools.engine.products import ProductTask

    Array = np.ndarray[Any, np.dtype[Any]]


def serves(task: ProductTask) -> bool:
    """Tell whether the C code is there, and made for this tensor: BF16, in rectangles of adjacent columns, apart."""
    sites = [term.site for term in task.terms]
    return (
        task.source.dtype == "BF16"
        and all(site.columns[2] == 1 for site in sites)
        and not any(one.meets(other) for one, other in combinations(sites, 2))
        and native.available()
    )


class Fused:
    """The products of a tensor, arranged for the C code once."""

    def __init__(self, task: ProductTask, buffers: floats.Buffers, result: TensorResult) -> None:
        self._task, self._buffers, self._result = task, buffers, result
        self._products = [
            native.products(
                term.left, term.right, term.factor, term.scale,
                term.magnitude if isinstance(term, RescaledSum) else None,
            )
            for term in task.terms
        ]  # fmt: skip
        self._bounds = [term.bound() * near_zero("BF16") for term in task.terms]
        covered = sum(term.site.shape[0] * term.site.shape[1] for term in task.terms)
        self._all = covered == task.source.parameters

    def change(self, stored: Array, start: int, measured: int) -> Array:
        """Return the tile whose first row is `start` changed, and add what is measured in its first rows to the result.

        Raises `IncompatibleAdapter` when a value is not finite, or a row has no direction.
        """
        import numpy as np

        out = self._buffers.of("out", stored.size, np.uint16).reshape(stored.shape)
        if not self._all:
            out[...] = stored
            check_finite(self._task, int(floats.magnitudes(stored, self._buffers).max()))
        for term, products, bound in zip(self._task.terms, self._products, self._bounds, strict=True):
            if not (met := term.site.overlap(start, start + len(stored))):
                continue
            inside = (met[0], slice(*term.site.columns))
            found = native.add_products(
                stored[inside], out[inside], products, met[1], self._buffers.of("sums", products.memory, np.float32),
                gains=term.factors if isinstance(term, RescaledSum) else None,
                bound=bound, measured=len(range(*met[0].indices(measured))),
            )  # fmt: skip
            if found.zero_row is not None:
                raise no_direction(term.site, found.zero_row)
            check_finite(self._task, found.largest)
            self._result.retained += found.retained
            self._result.total += found.total
            self._result.changed += found.changed
        return out
