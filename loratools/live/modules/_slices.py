"""Factors on slices of a fused weight, joined into those of the whole: one product for all slices of a module.

    A = [A₁; A₂; …]    B has sᵢ·Bᵢ in the rows on which slice i lands and in the columns of Aᵢ, and zeros elsewhere

So loralib's MergedLinear computes q and v of one weight; k stays as it is. So they are saved, too, as an update of the
module that the model has: PEFT knows no slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.parts import BIAS, MAGNITUDE
from loratools.adapter.parts import A as A_PART
from loratools.adapter.parts import B as B_PART
from loratools.adapter.placement.resolve import resolve
from loratools.adapter.placement.slices import Slice, slices
from loratools.live.site import Piece, Span
from loratools.storage.lazy import LazyTensor

STEP = "slices"
"""The parameter of an `attach` step that names the slices which were trained."""

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


def spans_of_parts(
    parts: Sequence[Slice], rank: int, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, tuple[Span, ...]]:
    """Return by its path where the outputs of each slice lie, as `resolve` places an adapter of a rank on it."""
    updates: dict[str, Update] = {}
    for part in parts:
        assert part.shape is not None  # others are refused, or left as they are
        out, width = part.shape
        A, B = torch.empty(rank, width, device="meta"), torch.empty(out, rank, device="meta")
        updates[part.path] = kinds.get("lora").build({A_PART: LazyTensor.of(A), B_PART: LazyTensor.of(B)}, 1.0, rank)
    spans: dict[str, tuple[Span, ...]] = {}
    for placement in resolve(Adapter(updates), shapes, config) if updates else ():
        site = placement.site
        spans[placement.module] = (*spans.get(placement.module, ()), (site.part_rows, slice(*site.outputs)))
    return spans


def taken_apart(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Adapter:
    """Return an adapter with slices again where `fused` made one update of them, so that they alone are trained on.

    The step in its provenance that attached it names them (`STEP`); an update that is not made of these blocks any
    more stays as it is.
    """
    steps = (step.parameters.get(STEP) for step in adapter.provenance if step.operation == "attach")
    wanted = next((names for names in steps if isinstance(names, list | tuple)), ())
    inside: dict[str, dict[int, Slice]] = defaultdict(dict)
    for part in slices(shapes, config) if wanted else ():
        if part.shape is not None and part.path.rpartition(".")[2] in wanted:
            inside[part.fused].setdefault(part.number, part)
    names = Names(shapes) if inside else None
    updates: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        tensors = names.find(module) if names else []
        numbered = inside.get(tensors[0].removesuffix(".weight"), {}) if tensors else {}
        parts = [numbered[number] for number in sorted(numbered)]
        blocks = _blocks(update, parts, shapes, config) if parts and update.kind in ("lora", "dora") else None
        updates |= blocks or {module: update}
    return replace(adapter, updates=updates)


def _blocks(
    update: Update, parts: Sequence[Slice], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, Update] | None:
    """Return the updates of slices that an update consists of, by path; None where it is not made of them."""
    if update.rank % len(parts):
        return None
    rank = update.rank // len(parts)
    loaded = {part: lazy.load() for part, lazy in update.parts.items()}
    rest = loaded[B_PART].clone()
    by_root = update.scaling == update.alpha / sqrt(update.rank) != update.alpha / update.rank
    blocks: dict[str, Update] = {}
    for i, (path, spans) in enumerate(spans_of_parts(parts, rank, shapes, config).items()):
        outputs = [place for _, at in sorted(spans, key=lambda s: s[0].start) for place in range(len(rest))[at]]
        ranks = slice(i * rank, (i + 1) * rank)
        own = {A_PART: loaded[A_PART][ranks], B_PART: loaded[B_PART][outputs, ranks]}
        own |= {part: loaded[part][outputs] for part in (MAGNITUDE, BIAS) if part in loaded}
        rest[outputs, ranks] = 0
        lazies = {part: LazyTensor.of(tensor.contiguous()) for part, tensor in own.items()}
        blocks[path] = kinds.get(update.kind).build(
            lazies, update.scaling, update.scaling * (sqrt(rank) if by_root else rank)
        )
    return None if rest.any() else blocks
