"""WaveFT: ΔW = s·IDWT₂(C), C zero but for n coefficients cₖ, as in PEFT.

`waveft_spectrum` (n,) has the coefficients; where they stand is in no file: PEFT draws n of the out·in places from the
seed of its config, and so does `_spectrum.drawn`. `layout` has the `seed` and the `wavelet`, null for none (`use_idwt`
is false): then ΔW[uₖ, vₖ] = s·cₖ. With a wavelet of L taps C has L − 2 rows and columns more, and one more if that is
odd, half of them before the places. Each half of a side has a filter of its own, g the first and h the second:

    ΔW[o, i] = s·Σₖ cₖ·yₖ[o + L − 2 − 2·(uₖ mod H/2)]·xₖ[i + L − 2 − 2·(vₖ mod W/2)]

with uₖ, vₖ on the larger sides H, W. As PEFT arranges the four quarters, y is h for coefficients in the *right* half
and x for those in the lower one. The filters are those of `wavelets.json` (tests/make/wavelets.py), from PyWavelets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._sparse import Sparse
from loratools.adapter.kinds._spectrum import Spectrum
from loratools.storage.lazy import LazyTensor

SPECTRUM = "waveft_spectrum"
_LAYOUT = ("seed", "wavelet")


@cache
def filters() -> Mapping[str, list[float]]:
    """Return the filters g of the wavelets, by name."""
    table: dict[str, list[float]] = json.loads(Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True, slots=True, eq=False)
class WaveftUpdate(Spectrum):
    """The coefficients, the seed of their places, and the wavelet. Raises `ValueError` for what is none of these."""

    kind = "waveft"
    part = SPECTRUM

    def __post_init__(self) -> None:
        Spectrum.__post_init__(self)
        if (wavelet := self.layout["wavelet"]) is not None and wavelet not in filters():
            raise ValueError(f"its wavelet is {wavelet!r}; PEFT can merge {', '.join(filters())}")

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return g, and h[t] = (−1)ᵗ·g[L − 1 − t]."""
        import torch

        g = torch.tensor(filters()[self.layout["wavelet"]], dtype=torch.float64)
        signs = torch.ones(len(g), dtype=torch.float64)
        signs[1::2] = -1
        return g, g.flip(0) * signs

    def _halves(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return of both sides 2·(u mod H/2) − L + 2, whether u is in the second half, and H/2."""
        taps = len(filters()[self.layout["wavelet"]])
        halves = []
        for at, side in zip(self.places(), self.shape, strict=True):
            half = (side + taps - 2 + side % 2) // 2  # taps are even in number
            at = at + (2 * half - side) // 2
            halves.append((2 * (at % half) - taps + 2, at >= half, half))
        return halves

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows: what the coefficients near them give, along the columns first and then along the rows."""
        import torch

        c = self.coefficients().to(device)
        if self.layout["wavelet"] is None:
            out, inner = self.shape
            sparse = Sparse.of(self.places(), c.to(dtype), (out, inner))
            return (sparse.transposed() if transposed else sparse).tile
        both = torch.stack(self._pair()).to(device)
        taps = both.shape[1]
        first, second = ((a.to(device), b.to(device), half) for a, b, half in self._halves())
        across = self.shape[0 if transposed else 1]
        (y, low, _), (x, right, width) = (second, first) if transposed else (first, second)
        # The filter along one side is chosen by the half that the coefficient is in along the other.
        column = (x + taps - 2) // 2

        def made(rows: slice) -> Tensor:
            near = ((y > rows.start - taps) & (y < rows.stop)).nonzero()[:, 0]
            tile = torch.zeros(2, rows.stop - rows.start, width, dtype=torch.float64, device=device)
            for tap in range(taps):
                at = y[near] + tap
                inside = (at >= rows.start) & (at < rows.stop)
                k = near[inside]
                place = (low[k].long(), at[inside] - rows.start, column[k])
                tile.index_put_(place, c[k] * both[right[k].long(), tap], accumulate=True)
            # Along the row: coefficient j adds its filter from 2j on.
            row = torch.zeros(rows.stop - rows.start, 2 * width + taps, dtype=torch.float64, device=device)
            for tap in range(taps):
                for half in (0, 1):
                    row[:, tap : tap + 2 * width : 2].add_(tile[half], alpha=float(both[half, tap]))
            return row[:, taps - 2 : taps - 2 + across].to(dtype)

        return made

    def dense(self) -> Tensor:
        """Return the sum over the coefficients, each a column times a row, both read off the filters."""
        import torch

        c, (out, inner) = self.coefficients(), self.shape
        if self.layout["wavelet"] is None:
            whole = torch.zeros(out, inner, dtype=torch.float64)
            whole[self.places()] = c
            return whole
        both = torch.nn.functional.pad(torch.stack(self._pair()), (0, 1))  # a zero at the end, for all beyond
        (y, low, _), (x, right, _) = self._halves()
        taps = both.shape[1] - 1

        def line(begin: Tensor, second: Tensor, count: int) -> Tensor:
            at = torch.arange(count) - begin[:, None]
            at = torch.where((at >= 0) & (at < taps), at, taps)
            return both[second.long()].gather(1, at)

        return (line(y, right, out) * c[:, None]).T @ line(x, low, inner)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are coefficients."""
    return parts.keys() == {SPECTRUM}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> WaveftUpdate:
    """Return the update; raise `ValueError` where nothing says the seed and the wavelet."""
    if not layout or any(name not in layout for name in _LAYOUT):
        raise ValueError("nothing says its wavelet, and from which seed its places are drawn (random_loc_seed)")
    return WaveftUpdate(dict(parts), scaling, alpha, None, {name: layout[name] for name in _LAYOUT})
