"""What `products.py` does to one site of a tensor: add a sum of products, and with DoRA rescale its rows. In NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds.dora import no_direction
from loratools.adapter.site import Site
from loratools.storage.codecs import floats

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# OpenBLAS has kernels for small products (M·N·K up to this) that take half the time at LoRA's ranks.
_SMALL = 1_000_000
_CHUNK = 1 << 16  # elements widened to float64 at a time: they stay in the core's cache


@dataclass(frozen=True, slots=True, eq=False)
class SumOfProducts:
    """Σ w·s·B·A over the adapters for one site as left · right; left (rows, k) is `factor` · diag(`scale`), rounded."""

    site: Site
    left: Array
    right: Array
    factor: Array
    scale: Array

    def bound(self) -> float:
        """Return a bound on any element: the largest row norm of left times column norm of right."""
        import numpy as np

        with np.errstate(over="ignore"):  # infinity stands for every magnitude
            return float(np.linalg.norm(self.left, axis=1).max() * np.linalg.norm(self.right, axis=0).max())

    def add_to(self, W: Array, rows: slice, change: Array) -> None:
        """Add these rows of left · right to W, by way of `change`, which is overwritten."""
        import numpy as np

        step = _SMALL // self.right.size & -4
        for start in range(0, len(W), step) if step else ():
            part = slice(start, start + step)
            np.matmul(self.left[rows][part], self.right, out=change[part])
        if not step:
            np.matmul(self.left[rows], self.right, out=change)
        W += change

    def finish(self, W: Array, rows: slice, buffers: floats.Buffers) -> None:
        """Leave the sum as it is."""

    def gains(self, rows: slice) -> Array:
        """Return what the sums in these rows were multiplied by, without signs, (rows, 1): nothing, or 1."""
        import numpy as np

        return np.ones((1, 1))

    def exact(self, W: Array, rows: Array, columns: Array) -> Array:
        """Return single elements of W + left·right in float64; `W` are those of the unchanged weight, in float64."""
        import numpy as np

        change = (self.factor[rows] * self.scale * self.right[:, columns].T).sum(axis=1, dtype=np.float64)
        found: Array = W + change
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RescaledSum(SumOfProducts):
    """DoRA: g∘(W + left·right), g = `magnitude` / ‖W + left·right‖ for each row. `factors` keeps g as tiles pass."""

    magnitude: Array
    factors: Array

    def finish(self, W: Array, rows: slice, buffers: floats.Buffers) -> None:
        """Rescale rows of the sum in place; raise `IncompatibleAdapter` for one that is zero."""
        import numpy as np

        step = max(1, _CHUNK // W.shape[1])
        for start in range(0, len(W), step):
            part = W[start : start + step]
            wide = buffers.of("wide", part.size, np.float64).reshape(part.shape)
            np.copyto(wide, part)
            squares = np.matmul(wide[:, None, :], wide[:, :, None])[:, 0, 0]
            own = slice(rows.start + start, rows.start + start + len(part))
            if not squares.all():
                raise no_direction(self.site, own.start + int(np.flatnonzero(squares == 0)[0]))
            self.factors[own] = self.magnitude[own] / np.sqrt(squares)
            part *= self.factors[own, None].astype(np.float32)

    def gains(self, rows: slice) -> Array:
        """Return the factors of these rows, without signs, (rows, 1)."""
        found: Array = abs(self.factors[rows, None])
        return found

    def exact(self, W: Array, rows: Array, columns: Array) -> Array:
        """Return single elements of g∘(W + left·right) in float64, of rows that were rescaled before."""
        found: Array = self.factors[rows] * SumOfProducts.exact(self, W, rows, columns)
        return found
