"""Block Krylov iteration for the leading singular values of a dense matrix: products with D and Dᵀ only.

Randomised block Krylov with full re-orthogonalisation and thick restarts (Musco & Musco 2015; Tropp & Webber 2023,
arXiv 2306.12418). Every product is kept and used, so that a given accuracy needs about half the products of subspace
iteration, above all on the flat spectra of real delta weights.

From b random columns an iteration sees at most b copies of a repeated singular value, however long it runs: what it
spans is invariant, not the row space. So random columns follow whenever that much has come of the ones before, and
only random columns along which D has nothing say that all of D was seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.linalg.orthonormal import (
    change_of_basis,
    extend,
    gram,
    line_sums,
    product64,
    well_conditioned,
)
from loratools.linalg.products import across, both, times
from loratools.linalg.svd.basis import ALIKE, COARSE, EXTRA, EXTRA_BLOCKS, FAR, LEFT
from loratools.linalg.svd.start import random_columns, sketched_start
from loratools.linalg.svd.stopping import CAUTION, Array, hidden, is_crowded, to_come

_MOST_STEPS = 60
# Random columns at once: each time as many as there were before, up to this.
_MOST_FRESH = 256
# Eight Gaussian columns all miss a direction (component below 0.1) with probability (0.2/√(2π))⁸ = 1.6e-9.
_PROBES = 8


class Krylov:
    """Grow V (n, k) orthonormal and Y = D·V, and know the singular values of Y: those of D seen so far.

    The energy that the best rank-r part of Y·Vᵀ captures, Σ_{i≤r} θᵢ with θ = eig(YᵀY) in float64, is exactly the
    energy of D that it removes: ‖D - Y_r·V_rᵀ‖² = ‖D‖² - Σ_{i≤r} θᵢ.
    """

    def __init__(
        self, D: Tensor, start: Tensor, deflated: Tensor | None = None, seed: int = 0, low: Tensor | None = None,
        onward: bool = False,
    ) -> None:  # fmt: skip
        """Start from the orthonormal columns `start` (n, b), and stay orthogonal to the columns `deflated` (n, d).

        `seed` draws the random columns that `refresh` adds; `fresh` counts them, with those of the start. `low` is D in
        bfloat16, to multiply instead of it: what is known of D is then known to about three digits. `restarted` tells
        whether Y has been turned since. `onward` is that of `append`.
        """
        self.D = D
        self.factor = D if low is None else low
        self.restarted = False
        self.V = D.new_empty(D.shape[1], 0)
        self.deflated = self.V if deflated is None else deflated
        self.parts: list[Tensor] = []
        self.G = torch.empty(0, 0, dtype=torch.float64)
        self.products = 0
        self.fresh = start.shape[1]
        self._generator = torch.Generator().manual_seed(seed)
        self._theta: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._lines: tuple[Tensor, Tensor] | None = None
        self._back: Tensor | None = None
        self.append(start, onward=onward)

    @classmethod
    def exact(cls, D: Tensor) -> Krylov:
        """Return the complete basis V = I, Y = D: the same algebra then gives the exact decomposition."""
        basis = cls(D, D.new_empty(D.shape[1], 0))
        basis.V = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
        basis.parts, basis.G, basis.products = [D], gram(D, D), D.shape[1]
        return basis

    @property
    def width(self) -> int:
        """Return the number of columns of V."""
        return self.V.shape[1]

    def append(self, new: Tensor, *, onward: bool = False) -> None:
        """Add orthonormal columns `new` (n, b), orthogonal to V, with their products D·new.

        If the iteration is to go `onward` from them, what it multiplies next is formed in the same pass over D.
        """
        Y, self._back = (both(self.factor, new) if onward else None) or (times(self.factor, new), None)
        self.products += new.shape[1]
        self.V = torch.cat([self.V, new], 1)
        self.parts.append(Y)
        sums = gram if self.factor is self.D else across  # sums of three digits need no float64
        edge = torch.cat([sums(part, Y) for part in self.parts]).double()
        old = len(self.G)
        G = edge.new_empty(self.width, self.width)
        G[:old, :old], G[:, old:], G[old:, :] = self.G, edge, edge.T
        self.G = G

    def residual(self) -> tuple[Tensor, Tensor]:
        """Return W = Dᵀ·Q (n, b) for Q = orth(last block of Y), and Q (m, b)."""
        Y = self.parts[-1]
        Q = well_conditioned(Y, self.G[-Y.shape[1] :, -Y.shape[1] :])
        self.products += Q.shape[1]
        return across(self.factor, Q), Q

    def news(self, W: Tensor) -> Tensor:
        """Return an orthonormal basis of what W (n, b) adds to V and to the deflated columns."""
        return extend(torch.cat([self.deflated, self.V], 1) if self.deflated.shape[1] else self.V, W)

    def beyond(self) -> Tensor:
        """Return W = Dᵀ·Q (n, b) as `residual` does, from DᵀY where that is known: it is DᵀY·R then, with Q = Y·R."""
        size = self.parts[-1].shape[1]
        change = None if self._back is None else change_of_basis(self.G[-size:, -size:])
        if self._back is None or change is None:
            return self.residual()[0]
        self.products += size
        return times(self._back, change.to(self._back.dtype))

    def step(self, *, onward: bool = False) -> bool:
        """Add one block: what Dᵀ·(last block of Y) shows that is new; return False when there is nothing new.

        `onward` is that of `append`.
        """
        new = self.news(self.beyond())[:, : self.D.shape[1] - self.width]
        if new.shape[1] == 0:
            return False
        self.append(new, onward=onward)
        return True

    def refresh(self, block: int) -> bool:
        """Add `block` random directions; return False, and add none, where D has nothing in what V does not span.

        Nothing is less than 8·eps·‖D‖: the rounding of D and of V.
        """
        G = torch.randn(self.D.shape[1], _PROBES, generator=self._generator, dtype=torch.float64).to(self.D.device)
        for _ in range(2):
            G -= product64(self.V, (self.V.T.double() @ G))
        self.products += 2 * _PROBES
        hidden = torch.linalg.vector_norm(product64(self.D, G), dim=0).max()
        if float(hidden) <= 8 * torch.finfo(self.D.dtype).eps * float(self.spectrum().sum().sqrt()):
            return False
        block = min(block, self.D.shape[1] - self.width)
        columns = torch.randn(self.D.shape[1], block, generator=self._generator, dtype=self.D.dtype)
        new = self.news(columns.to(self.D.device))
        if new.shape[1] == 0:
            return False
        self.append(new)
        self.fresh += new.shape[1]
        return True

    def hides(self, rank: int, *, counted: bool) -> bool:
        """Tell whether the first `rank` values of θ have a repeated one of which there may be more than is seen.

        That is one with as many copies as there were random columns. Of the last of the `rank` a further copy would
        change nothing, unless the rank was `counted` from the values.
        """
        theta = self.spectrum()[:rank]
        copies = theta[self.fresh - 1 :]
        first = theta[: len(copies)]
        alike = first <= ALIKE * copies
        return bool((alike if counted else alike & (copies > 1.001 * theta[-1])).any())

    def spectrum(self) -> Tensor:
        """Return θ, the squared singular values of Y, in descending order, float64 (k,)."""
        if self._theta is None or len(self._theta) != self.width:
            # Of a complete basis no step follows: the vectors are asked for next.
            values = self._eigenvectors()[0] if self.width == self.D.shape[1] else torch.linalg.eigvalsh(self.G)
            self._theta = values.flip(0).clamp_min(0)
        return self._theta

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of YᵀY, ascending, and its eigenvectors."""
        if self._eigen is None or len(self._eigen[0]) != self.width:
            self._eigen = torch.linalg.eigh(self.G)
        return self._eigen

    def leading(self, rank: int, *, rounded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return Y·X (m, r), θ (r,) and V·X (n, r) for the `rank` leading eigenvectors X of YᵀY.

        All in float64; with `rounded` Y·X is in D's dtype, as its products are: enough for factors in that dtype.
        """
        values, vectors = self._eigenvectors()
        X = vectors[:, -rank:].flip(1).to(self.D.device)
        start = 0
        dtype = self.D.dtype if rounded else torch.float64
        left = torch.zeros(self.D.shape[0], rank, dtype=dtype, device=self.D.device)
        for part in self.parts:
            piece = X[start : start + part.shape[1]]
            left += times(part, piece.to(dtype)) if rounded else product64(part, piece)
            start += part.shape[1]
        return left, values[-rank:].flip(0).clamp_min(0), product64(self.V, X)

    def directions(self, rank: int) -> Tensor:
        """Return V·X (n, r) in float64, as `leading` does."""
        return product64(self.V, self._eigenvectors()[1][:, -rank:].flip(1).to(self.D.device))

    def seen(self, rank: int, sketch: Tensor) -> Array:
        """Return Sᵀ·D·v for the columns of the sketch S and the leading directions v, (b, r): see `stopping.hidden`."""
        first = gram(self.parts[0], sketch)  # what came later is orthogonal to Dᵀ·S
        seen: Array = (first.T @ self._eigenvectors()[1][: len(first), -rank:].flip(1)).numpy()
        return seen

    def residual_edges(self) -> Tensor:
        """Return the max row norm + max column norm of D less the leading r-1 directions, for r = 1..k; (k,)."""
        if self._lines is None:
            rows, columns = line_sums(self.D)
            self._lines = rows.cpu(), columns.cpu()
        Y, theta, V = self.leading(self.width)
        # On the host: CUDA's running sums have no fixed order.
        rows, columns = (Y * Y).cpu(), (V * V * theta.to(V.device)).cpu()
        rows = self._lines[0][:, None] - rows.cumsum(1) + rows
        columns = self._lines[1][:, None] - columns.cumsum(1) + columns
        return rows.amax(0).clamp_min(0).sqrt() + columns.amax(0).clamp_min(0).sqrt()

    def restart(self, rank: int) -> None:
        """Keep the `rank` leading directions only, and the last block's news; the iteration goes on from there."""
        new = self.news(self.beyond())
        Y, theta, V = self.leading(rank)
        self.V, self.parts, self.G = V.to(self.D.dtype), [Y.to(self.D.dtype)], torch.diag(theta)
        self._theta, self._eigen, self.restarted = None, None, True
        if new.shape[1]:
            self.append(new)


def iterate(
    D: Tensor, norm2: float, wanted: Callable[[Krylov, bool], int | None], *, block: int, least: int,
    tolerance: float, seed: int, counted: bool, low: Tensor | None = None,
) -> tuple[Krylov, int, float] | None:  # fmt: skip
    """Grow a Krylov basis until the wanted rank is known and its captured energy has stopped growing.

    D is (m, n) with n ≤ m best; `norm2` is ‖D‖². `wanted(basis, complete)` says the rank that the singular values
    seen so far call for, or None for "show me more"; `complete` is true when no more exist, and `counted` tells that
    the rank hangs on the values. It is not asked before the basis has `least` columns. Stops when the
    energy still to be won, estimated with caution as `stopping.py` does, is ≤ tolerance·(‖D‖² - captured).
    Returns the basis, the rank, and that estimate. Always returns: a spectrum that resists only costs steps, and beyond
    half of the short side the complete basis is cheaper than to go on. With `low` (see `Krylov`) it returns None where
    the digits do not suffice: what is left, or the last direction seen, is near their rounding, or the complete basis
    would be next.
    """
    basis = Krylov(D, sketched_start(D if low is None else low, block, seed), seed=seed, low=low, onward=True)
    basis.products += block
    sketch = torch.from_numpy(random_columns(D.shape[0], min(block, D.shape[1]), seed)).to(D.device, basis.V.dtype)
    short = min(D.shape)
    last: tuple[Tensor, float | None] | None = None  # the values wanted, gain
    estimate = left = norm2

    def refreshed() -> bool:
        return basis.refresh(min(max(basis.fresh, block), _MOST_FRESH))

    def whole(basis: Krylov) -> tuple[Krylov, int, float] | None:
        return (basis, wanted(basis, True) or basis.width, 0.0) if low is None else None

    for _ in range(_MOST_STEPS + 2 * short // block):
        if 2 * basis.width >= short:
            return whole(Krylov.exact(D) if low is None else basis)
        if basis.width < least and basis.step(onward=True):
            continue
        theta = basis.spectrum()
        if low is not None and float(theta[-1]) <= COARSE * norm2 / short:
            return None
        if float(theta[-1]) <= (4 * torch.finfo(D.dtype).eps) ** 2 * float(theta[0]):
            # Rounding is in the basis: either this is all of D, or there is more beside what the iteration can reach.
            if not refreshed():
                return whole(basis)
            last = None
        elif (rank := wanted(basis, False)) is not None and rank <= basis.width:
            captured = float(theta[:rank].sum())
            left = max(norm2 - captured, 0.0)
            if low is not None and left < LEFT * norm2:
                return None
            gain = None
            if last is not None and len(last[0]) == rank:
                gain = max(captured - float(last[0].sum()), 0.0)
                crowded = is_crowded(theta.numpy(), rank, block)
                enough = max(tolerance / CAUTION * left, 1e-14 * norm2)
                estimate = to_come(gain, last[1], crowded=crowded)
                if estimate <= enough:
                    missed = hidden(theta[:rank].numpy(), last[0].numpy(), basis.seen(rank, sketch), crowded=crowded)
                    estimate = max(estimate, missed)
                if estimate <= enough:
                    if not basis.hides(rank, counted=counted):
                        return basis, rank, estimate
                    if not refreshed():
                        return whole(basis)
                    last = None
                    continue
            last = theta[:rank], gain
            if basis.width + block > rank + max(EXTRA_BLOCKS * block, EXTRA) and basis.width < short // 2:
                basis.restart(rank + block)
                continue
        if not basis.step(onward=last is None or last[1] is None or last[1] > FAR * tolerance * left):
            if not refreshed():
                return whole(basis)
            last = None
    return basis, len(last[0]) if last else basis.width, estimate
