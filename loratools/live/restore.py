"""Bring a saved adapter back into the parameters that are being trained, bit for bit: how a training resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter
from loratools.live.export import slice_groups
from loratools.live.modules._slices import outputs_of, ratios, rows_of
from loratools.live.site import Handle, Piece
from loratools.live.whole import Replacement


def restore(lora: Handle, name: str, folder: Path) -> None:
    """Copy the tensors of a saved adapter into those of a trainable one.

    Raises `IncompatibleAdapter` with every tensor that is missing, left over, or of another shape; nothing is changed
    then.
    """
    adapter = dialects.open_adapter(folder)
    wanted, stored = _wanted(lora, name), _tensors(adapter)
    problems = [f"{' '.join(key)}: not in {folder}" for key in wanted.keys() - stored.keys()]
    problems += [f"{' '.join(key)}: not among the adapter's modules here" for key in stored.keys() - wanted.keys()]
    shared = [key for key in wanted if key in stored]
    values = {key: stored[key].load() for key in shared}
    problems += [
        f"{' '.join(key)}: shape {tuple(values[key].shape)}, here {wanted[key].shape}"
        for key in shared
        if tuple(values[key].shape) != wanted[key].shape
    ]
    if problems:
        raise IncompatibleAdapter(
            f"{folder} does not hold the adapter {name!r} as it is trained here", sorted(problems)
        )
    with torch.no_grad():
        for key in shared:
            for tensor, index, factor in wanted[key].places:
                value = values[key][index]
                tensor.copy_(value if factor == 1 else value / factor)


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor of a file: its shape, and what it is made of: tensors, where each lies in it, and times what."""

    shape: tuple[int, ...]
    places: list[tuple[Tensor, Any, float]]


def _wanted(lora: Handle, name: str) -> dict[tuple[str, str], Stored]:
    """Return (module's path, part) -> what of the adapter the file's tensor is."""
    wanted: dict[tuple[str, str], Stored] = {}
    groups = slice_groups(lora, name)
    for path, pieces in groups.items():
        wanted |= _of_pieces(path, pieces, outputs_of(lora.sites[path]))
    grouped = {id(piece) for pieces in groups.values() for piece in pieces}
    for own, child, _, _ in lora.children():
        if own != name or id(child) in grouped:
            continue
        if isinstance(child, Piece):
            wanted |= _of_pieces(child.path, (child,), None)
        elif isinstance(child, Replacement):
            wanted[child.path, ""] = Stored(tuple(child.tensor.shape), [(child.tensor, (), 1)])
        else:
            for part, tensor in child.tensors().items():
                wanted[child.path, part] = Stored(tuple(tensor.shape), [(tensor, (), 1)])
    return wanted


def _of_pieces(path: str, pieces: Sequence[Piece], outputs: int | None) -> dict[tuple[str, str], Stored]:
    """Return the tensors that pieces are in a file: of one, or of slices of a module with so many outputs."""
    roles, start = pieces[0].roles, 0
    stored = {role: Stored((), []) for role in roles}
    for piece, ratio in zip(pieces, ratios(pieces), strict=True):
        rows = slice(None) if outputs is None else rows_of(piece)
        factors = [(piece.A, piece.B, 1.0)]
        if piece.A0 is not None and piece.B0 is not None:
            factors.append((piece.A0, piece.B0, -1.0))
        for A, B, sign in factors:
            ranks = slice(start, start + len(A))
            start += len(A)
            stored["A"].places.append((A, (ranks,), 1.0))
            stored["B"].places.append((B, (rows, ranks), sign * ratio))
        for role in roles.keys() - {"A", "B"}:
            tensor = getattr(piece, role)
            stored[role].places.append((tensor, (rows,) if outputs else (), ratio if role == "bias" else 1.0))
    for role, each in stored.items():
        first = each.places[0][0]
        sides = {"A": (start, *first.shape[1:]), "B": (outputs or len(first), start, *first.shape[2:])}
        each.shape = sides.get(role, tuple(first.shape) if outputs is None else (outputs, *first.shape[1:]))
    return {(path, roles[role]): each for role, each in stored.items()}


def _tensors(adapter: Adapter) -> Mapping[tuple[str, str], Any]:
    parts = {(m, part): lazy for m, update in adapter.updates.items() for part, lazy in update.parts.items()}
    return parts | {(path, ""): lazy for path, lazy in adapter.replacements.items()}
