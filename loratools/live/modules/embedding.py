"""nn.Embedding: the row of W (V, d) of each token, plus s·B·A of it; A is (r, V), B (d, r)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING
from loratools.errors import IncompatibleAdapter
from loratools.live.modules._affine import has_own_forward
from loratools.live.product import row_norms
from loratools.live.site import Piece, Site


class EmbeddingSite(Site):
    """An embedding with adapters."""

    weight: Any
    padding_idx: int | None
    scale_grad_by_freq: bool

    def changed(self, pieces: list[tuple[Piece, float]], ids: Tensor, *args: Any, **settings: Any) -> Any:
        y = self.plain_forward(ids, *args, **settings)
        scale = self.scale()
        for piece, weight in pieces:
            delta = self.delta(ids, piece.A, piece.B) * (piece.scaling * weight)
            if piece.A0 is not None and piece.B0 is not None:
                delta = delta - self.delta(ids, piece.A0, piece.B0) * (piece.scaling * weight)
            delta = (delta * scale).to(y.dtype)
            if piece.magnitude is None:
                y = y + delta
                continue
            with torch.no_grad():
                norms = row_norms(self.weight.T, piece.B, piece.A, piece.scaling * weight)
            y = (piece.magnitude.flatten() / norms.to(piece.magnitude.dtype)).to(y.dtype) * (y + delta)
        return y

    def delta(self, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return B·A of each token, without the scale."""
        return F.embedding(ids, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq) @ B.T

    def scale(self) -> Any:
        """Return what the class multiplies its rows with: `embed_scale`, as Gemma's and BART's have it."""
        return getattr(self, "embed_scale", 1.0) if has_own_forward(self, nn.Embedding) else 1.0


def claims(module: nn.Module) -> bool:
    """Tell whether a module is an nn.Embedding; raise where its class computes in a way that is not known."""
    if not isinstance(module, nn.Embedding):
        return False
    if module.max_norm is not None:
        raise IncompatibleAdapter(
            f"an embedding with max_norm={module.max_norm:g} shortens rows of its own weight whenever it runs, so no "
            "change of the weight is like a change of the output"
        )
    if has_own_forward(module, nn.Embedding) and not hasattr(module, "embed_scale"):
        raise IncompatibleAdapter(
            f"{type(module).__qualname__} is an nn.Embedding with a forward of its own, which need not look rows up"
        )
    return True


def shape(module: Any) -> tuple[int, ...]:
    """Return (V, d)."""
    V, d = module.weight.shape
    return int(V), int(d)


def sides(module: Any) -> tuple[int, ...]:
    """Return (d, V): an embedding has V inputs, one of which is 1."""
    return shape(module)[::-1]


def matrix(module: Any) -> Tensor | None:
    """Return the transposed weight, or None where it is stored as codes."""
    W: Tensor = module.weight
    return W.T if W.is_floating_point() else None


SITE, KIND, NAMES, ZERO = EmbeddingSite, "embedding", (A_EMBEDDING, B_EMBEDDING), "A"
