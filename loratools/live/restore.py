"""Bring a saved adapter back into the parameters that are being trained, bit for bit: how a training resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter
from loratools.live.site import Handle, Piece
from loratools.live.whole import Replacement


def restore(lora: Handle, name: str, folder: Path) -> None:
    """Copy the tensors of a saved adapter into those of a trainable one.

    Raises `IncompatibleAdapter` with every tensor that is missing, left over, or of another shape; nothing is changed
    then.
    """
    adapter = dialects.open_adapter(folder)
    wanted, stored = _parameters(lora, name), _tensors(adapter)
    problems = [f"{key}: not in {folder}" for key in wanted.keys() - stored.keys()]
    problems += [f"{key}: not among the adapter's modules here" for key in stored.keys() - wanted.keys()]
    shared = [key for key in wanted if key in stored]
    values = {key: stored[key].load() for key in shared}
    problems += [
        f"{key}: shape {tuple(values[key].shape)}, here {tuple(_shape(wanted[key]))}"
        for key in shared
        if tuple(values[key].shape) != tuple(_shape(wanted[key]))
    ]
    if problems:
        raise IncompatibleAdapter(
            f"{folder} does not hold the adapter {name!r} as it is trained here", sorted(problems)
        )
    with torch.no_grad():
        for key in shared:
            start = 0
            axis, parts = wanted[key]
            for tensor, sign in parts:
                length = tensor.shape[axis] if tensor.dim() else 1
                value = values[key] if len(parts) == 1 else values[key].narrow(axis, start, length)
                tensor.copy_(value if sign > 0 else -value)
                start += length


Parts = tuple[int, list[tuple[Tensor, int]]]
"""An axis, and the tensors that lie along it in the file, each with its sign there."""


def _parameters(lora: Handle, name: str) -> dict[tuple[str, str], Parts]:
    """Return (module's path, part) -> where the file's tensor goes."""
    wanted: dict[tuple[str, str], Parts] = {}
    for own, child, _, _ in lora.children():
        if own != name:
            continue
        if isinstance(child, Replacement):
            wanted[child.path, ""] = 0, [(child.tensor, 1)]
            continue
        for part, tensor in child.tensors().items():
            wanted[child.path, part] = 0, [(tensor, 1)]
        if isinstance(child, Piece) and child.A0 is not None and child.B0 is not None:
            wanted[child.path, child.roles["A"]] = 0, [(child.A, 1), (child.A0, 1)]
            wanted[child.path, child.roles["B"]] = 1, [(child.B, 1), (child.B0, -1)]
    return wanted


def _tensors(adapter: Adapter) -> Mapping[tuple[str, str], Any]:
    parts = {(m, part): lazy for m, update in adapter.updates.items() for part, lazy in update.parts.items()}
    return parts | {(path, ""): lazy for path, lazy in adapter.replacements.items()}


def _shape(parts: Parts) -> list[int]:
    axis, tensors = parts
    sides = list(tensors[0][0].shape)
    if len(tensors) > 1:
        sides[axis] = sum(tensor.shape[axis] for tensor, _ in tensors)
    return sides
