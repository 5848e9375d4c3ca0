"""LyCORIS' weight decomposition: W' = (W + ΔW)∘(1 + w·(m/‖W + ΔW‖ − 1)), over any additive kind.

m is `dora_scale`. Its shape says which norm is meant: (out, 1, …) that of each output feature, (1, in, …) that of each
input feature over outputs and kernel, which PEFT's DoRA does not know. The weight w acts on the factors alone, as in
LyCORIS. After other updates of the same weight the norm is still that of the unchanged base + ΔW, as with kind `dora`,
and the factors act on what is there: the order counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._wrapper import Wrapper
from loratools.adapter.kinds.dora import gains, squares
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter

SCALE_PART = "dora_scale"


@dataclass(frozen=True, slots=True, eq=False)
class WdoraUpdate(Wrapper):
    """An additive update and the magnitudes of its features. Raises `ValueError` where their shapes do not fit."""

    kind = "wdora"
    part = SCALE_PART
    around = ("lora", "conv", "locon", "loha", "lokr")

    def __post_init__(self) -> None:
        shape, (out, columns) = self.magnitude.shape, (self.inner.shape[0], prod(self.inner.shape[1:]))
        if len(shape) < 2 or prod(shape[2:]) != 1 or (shape[:2] != (out, 1) and (shape[0] != 1 or columns % shape[1])):
            raise ValueError(f"{SCALE_PART} has shape {shape}, expected {(out, 1)} or one number for each input")

    def fitted(self, shape: tuple[int, ...]) -> WdoraUpdate:
        """Return the update of a base weight of this shape."""
        return replace(self, inner=self.inner.fitted(shape))

    @property
    def by_input(self) -> bool:
        """Whether there is a magnitude for each input feature."""
        return self.magnitude.shape[0] == 1 and self.inner.shape[0] != 1

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Decomposed:
        """Return the term; raise `IncompatibleAdapter` where the features of a norm do not all lie on the site."""
        whole = site.part == (0, self.shape[0])
        if site.transposed or (self.by_input and not whole):
            raise IncompatibleAdapter(f"{site.tensor}: wdora needs the weight whole, as [out, in, …]")
        m = self.magnitude.load().to(device).double().flatten()
        kernel = site.shape[1] // len(m) if self.by_input else 1
        m = m if self.by_input else m[site.part_rows]
        return Decomposed(self.inner.term(site, 1.0, dtype, device), m, site, self.by_input, kernel, weight)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·W'ᵀ from the dense W + ΔW in float64; W is the unchanged one for the norm."""
        m = self.magnitude.load().to(X).flatten()
        changed = under.base() + self.inner.delta_weight().double().flatten(1)[under.site.part_rows]
        if not self.by_input:
            factors: Tensor = 1 + weight * (m[under.site.part_rows] / changed.norm(dim=1) - 1)
            return self.inner.project(X, 1.0, under) * factors
        norms = changed.view(len(changed), len(m), -1).norm(dim=(0, 2))
        factors = (1 + weight * (m / norms - 1)).repeat_interleave(changed.shape[1] // len(m))
        return self.inner.project(X * factors, 1.0, under)


@dataclass(slots=True, eq=False)
class Decomposed(Term):
    """The term W ← f∘(W + ΔW). Norms over rows are those of a tile; norms over columns take a pass of their own."""

    inner: Term
    magnitude: Tensor
    site: Site
    by_input: bool
    kernel: int
    weight: float
    squares: Tensor | None = None

    needs_base = True

    @property
    def needs_pass(self) -> bool:
        return self.by_input

    def observe_rows(self, base: Tensor, rows: slice) -> None:
        """Add the squares of W + ΔW, input feature by input feature."""
        changed = base.clone()
        self.inner.apply_rows(changed, rows, None)
        norms2 = squares(changed, 0).view(-1, self.kernel).sum(1)
        self.squares = norms2 if self.squares is None else self.squares + norms2

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        self.inner.apply_rows(W, rows, None)
        if self.squares is not None:
            g = gains(self.site, self.magnitude, self.squares, side="input")
            W.mul_(self._toward(g).repeat_interleave(self.kernel).to(W.dtype))
            return
        changed = W
        if base is not None:
            changed = base.clone()
            self.inner.apply_rows(changed, rows, None)
        g = gains(self.site, self.magnitude[rows], squares(changed, 1), rows.start)
        W.mul_(self._toward(g)[:, None].to(W.dtype))

    def _toward(self, g: Tensor) -> Tensor:
        return 1 + self.weight * (g - 1)


claims, build = WdoraUpdate.claims, WdoraUpdate.build
