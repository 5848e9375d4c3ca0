"""DoRA: W'_o = m_o · (W + s·ΔW)_o / ‖(W + s·ΔW)_o‖₂ (Liu et al. 2024, arXiv 2402.09353), with PEFT's meaning.

X_o is all of X that belongs to output feature o: row o of a linear weight, X[o, …] of a convolution, column o of an
embedding (V, d). ΔW is that of `lora`, `conv` or `embedding`; the bias of the layer stays as it is.

Several adapters on one weight compose in the order given, W ← g₂·(g₁·(W₀ + Δ₁) + Δ₂), and every g = m / ‖W₀ + own Δ‖
takes its norm from the unchanged base W₀, as PEFT ≥ 0.20 does when it computes and when it merges. This is not
commutative. A weight w of the merge scales s, as PEFT's `set_scale` does: w = 0 leaves W₀ with its rows rescaled to m,
not W₀ itself. A feature whose norm is zero has no direction, and is an error.

What g is stands in `gains`, of norms by `squares`, for all who work with torch; `project` proves it on another path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, cast

from loratools.adapter.basis import Basis, rescaled
from loratools.adapter.kinds import Device, DType, Factors, Tensor, Term, Underlying
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.kinds._sum import Product
from loratools.adapter.kinds._wrapper import Wrapper
from loratools.adapter.parts import MAGNITUDE
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

_CHUNK = 1 << 16  # elements widened to float64 at a time: they stay in the core's cache
_BLOCK = 64
_SAFE = 1e-24  # the squares of numbers with such a sum are far from where float32 ends


@dataclass(frozen=True, slots=True, eq=False)
class DoraUpdate(Wrapper):
    """A low-rank update and a magnitude for each output feature. Raises `ValueError` where their sizes differ."""

    inner: LowRank

    kind = "dora"
    part = MAGNITUDE
    around = ("lora", "conv", "embedding")

    def __post_init__(self) -> None:
        shape, features = self.magnitude.shape, self.features
        if self.magnitude.parameters != features or sum(side != 1 for side in shape) > 1:
            raise ValueError(f"{MAGNITUDE} has shape {shape}, expected one number for each of {features} features")

    @property
    def by_column(self) -> bool:
        """Whether an output feature is a column of the weight as the module defines it: so it is in an embedding."""
        return self.inner.kind == "embedding"

    @property
    def features(self) -> int:
        """Number of output features."""
        return self.shape[1 if self.by_column else 0]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """The factors and the magnitude, in the shape that PEFT gives it: (out,), or (1, out, 1…) of a convolution."""
        sides = len(self.shape) - 2
        shape = (1, self.features, *(1,) * sides) if sides else (self.features,)
        return {**self.inner.parts, MAGNITUDE: self.magnitude.reshaped(shape)}

    @property
    def roles(self) -> Mapping[str, str]:
        return {**self.inner.roles, "magnitude": MAGNITUDE}

    def factored(self) -> Factors:
        """Return the factors of the inner update, and m."""
        m = self.magnitude.reshaped((self.features,))
        return self.inner.factored()._replace(magnitude=m, by_column=self.by_column)

    def carried(self, basis: Basis) -> Self:
        """Return the inner update's like, and the magnitudes by which it gets the factors that it has in W.

        Raises `ValueError` for an embedding, whose features are columns.
        """
        if self.by_column:
            raise ValueError("DoRA of an embedding has magnitudes along columns")
        inner = cast(LowRank, self.inner.carried(basis))

        def product(rows: slice) -> Tensor:
            left, right = (factor.double() for factor in inner.factored().load())
            return basis.read(rows) + basis.weight * self.scaling * (left[rows] @ right)

        m = self.magnitude.reshaped((self.features,))
        return replace(self, inner=inner, magnitude=rescaled(m, product, basis, self.features))

    def weighted(self, weight: float) -> DoraUpdate | None:
        """Return the update whose inner one has the weight: W' = g∘(W + w·ΔW), g = m/‖W₀ + w·ΔW‖."""
        inner = self.inner.weighted(weight)
        return replace(self, inner=inner) if isinstance(inner, LowRank) else None

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Rescaling:
        """Return the term of a site, with m of the features that land there."""
        m, across = magnitudes(self.factored(), site)
        m = m.to(device)
        return Rescaling(self.inner.term(site, weight, dtype, device), m, site, across, m.new_zeros(len(m)))

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return g∘(X·Wᵀ + X·Δᵀ), or (X∘g)·(W + Δ)ᵀ for an embedding.

        The norm takes another path than `term`: ‖w + Δ‖² = ‖w‖² + 2⟨w, Δ⟩ + ‖Δ‖², from the factors, without a dense Δ.
        """
        W, m = under.base(), self.magnitude.load().flatten().to(X)
        left, right = (factor.to(X) for factor in self.inner.factored().load())
        left = left[under.site.part_rows] * (weight * self.scaling)
        if self.by_column:
            W, left, right = W.T, right.T, left.T
        else:
            m = m[under.site.part_rows]
        cross = (left * (W @ right.T)).sum(1)
        squares = W.square().sum(1) + 2 * cross + (left * (left @ (right @ right.T))).sum(1)
        g = m / squares.sqrt()
        if self.by_column:
            return under.below(X * g) + ((X * g) @ left) @ right
        return g * (under.below(X) + (X @ right.T) @ left.T)


@dataclass(slots=True, eq=False)
class Rescaling(Term):
    """The term W ← g∘(W + left·right), g = m / ‖W₀ + left·right‖, along rows of the rectangle or across them.

    `across` says that a feature is a column of the rectangle: then `observe_rows` gathers `squares` in a pass of its
    own. Otherwise each tile has the whole of its features. `factors` keeps g in float64.
    """

    product: Product
    magnitude: Tensor
    site: Site
    across: bool
    factors: Tensor
    squares: Tensor | None = None

    needs_base = True

    @property
    def needs_pass(self) -> bool:
        return self.across

    def observe_rows(self, base: Tensor, rows: slice) -> None:
        """Add the squares of W₀ + left·right, column by column; the last tile makes factors of them."""
        changed = base.addmm(self.product.left[rows], self.product.right)
        self.squares = squares(changed, 0) if self.squares is None else self.squares + squares(changed, 0)
        if rows.stop == self.site.shape[0]:
            self.factors[:] = gains(self.site, self.magnitude, self.squares)

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        self.product.apply_rows(W, rows, None)
        if not self.across:
            changed = W if base is None else base.addmm(self.product.left[rows], self.product.right)
            self.factors[rows] = gains(self.site, self.magnitude[rows], squares(changed, 1), rows.start)
        W.mul_((self.factors if self.across else self.factors[rows, None]).to(W.dtype))

    def bound(self) -> float:
        return self.product.bound()

    def gain(self, rows: slice) -> float:
        """Return the largest factor in these rows, which were applied before."""
        return float(self.factors[slice(None) if self.across else rows].abs().max())

    def elements(self, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return single elements of g∘(W + left·right) in float64, of rows that were applied before."""
        factors = self.factors.to(W.device)[columns if self.across else rows]
        return factors * self.product.elements(W, rows, columns)


def magnitudes(factors: Factors, site: Site) -> tuple[Tensor, bool]:
    """Return m of the features that land on a site in float64, and whether a feature is a column of its rectangle."""
    assert factors.magnitude is not None
    m = factors.magnitude.load().flatten().double()
    return m if factors.by_column else m[site.part_rows], factors.by_column != site.transposed


def gains(site: Site, magnitude: Tensor, squares: Tensor, first: int = 0, side: str = "output") -> Tensor:
    """Return g = m / ‖W₀ + ΔW‖ of features, of which `first` is the first, from their sums of squares.

    Raises `IncompatibleAdapter` for a feature that is zero everywhere; `side` says what features these are.
    """
    if not bool(squares.all()):
        raise no_direction(site, first + int((squares == 0).nonzero()[0]), side)
    return magnitude / squares.sqrt()


def no_direction(site: Site, feature: int, side: str = "output") -> IncompatibleAdapter:
    """Return the exception for a feature of a site that is zero in all of W + ΔW."""
    return IncompatibleAdapter(
        f"{site.tensor}: W + ΔW is zero in all of {side} feature {site.part[0] + feature}, "
        "so DoRA's factor m / ‖W + ΔW‖ has no value",
        hint="PEFT would write NaN there. Check that this is the base model that the adapter was trained on.",
    )


def squares(W: Tensor, axis: int) -> Tensor:
    """Return the sums of squares along an axis in float64.

    Along rows of float32 numbers, blocks of 64 are summed in float32 first: that errs by 2e-8, less than the numbers
    themselves do, and takes a quarter of the time. Sums that float32 could not hold are not made so.
    """
    import torch

    if axis == 1 and W.dtype == torch.float32 and W.shape[1] % _BLOCK == 0:
        sums = W.view(len(W), -1, _BLOCK).square().sum(2).double().sum(1)
        if bool(((sums > _SAFE) & (sums < 1 / _SAFE)).all()):
            return sums
    step = max(1, _CHUNK // W.shape[1])
    chunks = (W[start : start + step].to(torch.float64, copy=True) for start in range(0, len(W), step))
    parts = [chunk.square_().sum(axis) for chunk in chunks]
    return torch.cat(parts) if axis == 1 else torch.stack(parts).sum(0)


claims, build = DoraUpdate.claims, DoraUpdate.build
