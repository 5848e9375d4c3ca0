"""Factors on slices of a fused weight, joined into those of the whole: one product for all slices of a module.

    A = [A₁; A₂; …]    B has sᵢ·Bᵢ in the rows on which slice i lands and in the columns of Aᵢ, and zeros elsewhere

So loralib's MergedLinear computes q and v of one weight; k stays as it is. So they are saved, too, as an update of the
module that the model has: PEFT knows no slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.parts import BIAS, MAGNITUDE
from loratools.adapter.parts import A as A_PART
from loratools.adapter.parts import B as B_PART
from loratools.live.site import Piece
from loratools.storage.lazy import LazyTensor

Weighted = Sequence[tuple[Piece, float]]


def joinable(pieces: Sequence[Piece]) -> bool:
    """Tell whether pieces of one linear layer are plain factors on slices of it whose inputs are dropped alike."""
    plain = all(
        piece.spans is not None and piece.magnitude is None and piece.bias is None and piece.A0 is None
        for piece in pieces
    )
    return plain and all(map(_lands, pieces)) and len({piece.dropout for piece in pieces}) == 1


def _lands(piece: Piece) -> bool:
    """Tell whether all rows of a piece land on its module."""
    if piece.places is not None or piece.spans is None:
        return True
    return len(piece.spans) == 1 and piece.spans[0][0] == slice(0, len(piece.B))


def joined(pieces: Weighted, outputs: int) -> tuple[Tensor, Tensor]:
    """Return A (Σr, in) and B (outputs, Σr) of pieces, each with a weight, the scalings in B; autograd knows how."""
    Bs = [spread(piece, piece.B * (piece.scaling * weight), outputs) for piece, weight in pieces]
    if len(pieces) == 1:
        return pieces[0][0].A, Bs[0]
    return torch.cat([piece.A for piece, _ in pieces]), torch.cat(Bs, 1)


def spread(piece: Piece, rows: Tensor, outputs: int) -> Tensor:
    """Return a tensor of `outputs` rows, which has the rows of a piece where they land, and zeros elsewhere."""
    if piece.places is not None:
        return rows.new_zeros(outputs, *rows.shape[1:]).index_copy(0, piece.places.to(rows.device), rows)
    if piece.spans is None:
        return rows
    ((part, at),) = piece.spans
    return F.pad(rows[part], (*(0, 0) * (rows.dim() - 1), at.start, outputs - at.stop))


def rows_of(piece: Piece) -> Tensor | slice:
    """Return where the rows of a slice lie among those of its module: what `spread` puts there, an index takes out."""
    if piece.places is not None:
        return piece.places.cpu()
    ((_, at),) = piece.spans or ()
    return at


def fusible(pieces: Sequence[Piece], site: Any) -> bool:
    """Tell whether pieces of one adapter on a module are slices that one update of the module can say."""
    sliced = all(piece.spans is not None and _lands(piece) for piece in pieces)
    alike = len({piece.kind for piece in pieces}) == 1 and all(piece.scaling for piece in pieces)
    return sliced and alike and (pieces[0].magnitude is None or site.matrix() is not None)


def fused(pieces: Sequence[Piece], updates: Sequence[Update], site: Any) -> Update:
    """Return the update of a whole module that the `updates` of slices of it are, whose pieces are `fusible`.

    Its rank is that of all slices together, its scaling that of the first, into which the others' B are brought. Where
    no slice lies, a magnitude is the norm of the weight: DoRA changes nothing there.
    """
    outputs, first = outputs_of(site), updates[0]
    loaded = [{part: lazy.load() for part, lazy in update.parts.items()} for update in updates]
    for parts, ratio in zip(loaded, ratios(updates), strict=True):
        if ratio != 1:
            parts |= {part: parts[part] * ratio for part in (B_PART, BIAS) if part in parts}
    own = [
        {part: tensor if part == A_PART else spread(piece, tensor, outputs) for part, tensor in parts.items()}
        for piece, parts in zip(pieces, loaded, strict=True)
    ]
    whole = {
        A_PART: torch.cat([parts[A_PART] for parts in own]),
        B_PART: torch.cat([parts[B_PART] for parts in own], 1),
    }
    if biases := [parts[BIAS] for parts in own if BIAS in parts]:
        whole[BIAS] = torch.stack(biases).sum(0)
    if first.kind == "dora":
        norms = site.matrix().detach().double().norm(dim=1).cpu().to(own[0][MAGNITUDE].dtype)
        for piece in pieces:
            norms = torch.where(spread(piece, torch.ones(len(piece.B)), outputs) > 0, 0, norms)
        whole[MAGNITUDE] = norms + torch.stack([parts[MAGNITUDE] for parts in own]).sum(0)
    rank = len(whole[A_PART])
    by_root = first.scaling == first.alpha / sqrt(first.rank) != first.alpha / first.rank
    lazies = {part: LazyTensor.of(tensor.contiguous()) for part, tensor in whole.items()}
    alpha = first.scaling * (sqrt(rank) if by_root else rank)
    update: Update = kinds.get(first.kind).build(lazies, first.scaling, alpha)
    return update


def ratios(scaled: Sequence[Update] | Sequence[Piece]) -> list[float]:
    """Return by what B of each slice is multiplied, for all to have the scaling of the first."""
    return [each.scaling / scaled[0].scaling for each in scaled]


def outputs_of(site: Any) -> int:
    """Return the number of outputs of a linear layer with adapters, however it stores its weight."""
    W = site.matrix()
    return int(site.out_features if W is None else W.shape[0])
