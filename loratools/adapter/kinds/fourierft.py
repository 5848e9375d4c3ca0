"""FourierFT: ΔW = s·Re(IDFT₂(F)), F zero but for n coefficients cₖ (arXiv 2405.03003), as in PEFT.

`fourierft_spectrum` (n,) has the coefficients; where they stand is in no file: PEFT draws n of the out·in places from
the seed of its config, here `layout = {"seed": 777}`, and so does `_spectrum.drawn`. With (uₖ, vₖ) the row and column,

    ΔW[o, i] = s/(out·in) · Σₖ cₖ·cos 2π(uₖ·o/out + vₖ·i/in)

Rows come from one transform along each: Σ over the coefficients of a column first, then the IDFT of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._spectrum import Spectrum
from loratools.storage.lazy import LazyTensor

SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True, slots=True, eq=False)
class FourierftUpdate(Spectrum):
    """The coefficients and the seed of their places. Raises `ValueError` for more of them than the weight has room."""

    kind = "fourierft"
    part = SPECTRUM

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows, each the IDFT of what the coefficients give it; worked out in double precision."""
        import torch

        places, sides = self.places(), self.shape
        (u, v), (out, inner) = (places[::-1], sides[::-1]) if transposed else (places, sides)
        u, v, c = u.to(device), v.to(device), self.coefficients().to(device)

        def tile(rows: slice) -> Tensor:
            at = torch.arange(rows.start, rows.stop, device=device)
            angles = (at[:, None] * u % out).double() * (2 * torch.pi / out)
            spectrum = torch.zeros(len(at), inner, dtype=torch.complex128, device=device)
            spectrum.index_add_(1, v, torch.polar(c.expand_as(angles), angles))
            made: Tensor = torch.fft.ifft(spectrum).real / out
            return made.to(dtype)

        return tile

    def dense(self) -> Tensor:
        """Return the sum of cosines, which the cosines and sines of both sides make: cos(a + b) = cos·cos − sin·sin."""
        import torch

        (u, v), (out, inner) = self.places(), self.shape
        c = self.coefficients() / (out * inner)
        a = (torch.arange(out)[:, None] * u % out).double() * (2 * torch.pi / out)
        b = (torch.arange(inner)[:, None] * v % inner).double() * (2 * torch.pi / inner)
        return (a.cos() * c) @ b.cos().T - (a.sin() * c) @ b.sin().T


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are coefficients."""
    return parts.keys() == {SPECTRUM}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> FourierftUpdate:
    """Return the update; raise `ValueError` where nothing says the seed."""
    if not layout or "seed" not in layout:
        raise ValueError("nothing says from which seed the places of its coefficients are drawn (random_loc_seed)")
    return FourierftUpdate(dict(parts), scaling, alpha, None, {"seed": layout["seed"]})
