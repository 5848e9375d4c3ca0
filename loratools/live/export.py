"""From a running model back to an `Adapter`, and to a file of our format, sealed with the model it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.decisions import warned
from loratools.errors import IncompatibleAdapter
from loratools.format import manifest, writer
from loratools.live.identity import seal
from loratools.live.modules._affine import AffineSite
from loratools.live.modules._slices import fused, fusible
from loratools.live.place import Layout
from loratools.live.site import Handle, Piece
from loratools.live.whole import Replacement, Stack, TokenRows
from loratools.storage.lazy import LazyTensor


def adapter_of(lora: Handle, name: str) -> Adapter:
    """Return an adapter of a model as a value of its own: nothing that is trained later changes it.

    One that started from a part of the weight (PiSSA, OLoRA) comes as plain LoRA of twice the rank, B·A − B₀·A₀.
    """
    entry: Any = lora.entries[name]
    if not entry.trainable:
        assert entry.adapter is not None
        given: Adapter = entry.adapter
        return given
    updates: dict[str, Update] = {}
    replacements: dict[str, LazyTensor] = {}
    for own, child, _, _ in lora.children():
        if own != name:
            continue
        if isinstance(child, Piece):
            updates[child.path] = update_of(child)
        elif isinstance(child, Stack | TokenRows):
            parts = {part: copied(tensor) for part, tensor in child.tensors().items()}
            updates[child.path] = kinds.get(child.kind).build(parts, child.scaling, child.alpha, child.layout)
        elif isinstance(child, Replacement):
            replacements[child.path] = copied(child.tensor)
    before = entry.adapter
    if before is not None:
        settings = {key: value for key, value in before.settings.items() if key != manifest.ORIGIN}
        base, steps = before.base, before.provenance
    else:
        settings, steps, base = dict(entry.settings), (), None
    if entry.step is not None:
        steps = (*steps, entry.step)
    base = base or BaseIdentity.of_name(getattr(getattr(lora.model, "config", None), "name_or_path", None))
    return Adapter(updates, replacements, base, steps, "live", settings)


def update_of(piece: Piece) -> Update:
    """Return the update that a piece is now, its tensors copied."""
    tensors = piece.tensors()
    if piece.A0 is not None and piece.B0 is not None:
        A, B = piece.roles["A"], piece.roles["B"]
        # Along the rank: the first side of A, the second of B.
        tensors[A] = torch.cat([whole(tensors[A]), whole(piece.A0)])
        tensors[B] = torch.cat([whole(tensors[B]), -whole(piece.B0)], 1)
    doubled = 1 if piece.A0 is None else 2
    parts = {part: copied(tensor) for part, tensor in tensors.items()}
    update: Update = kinds.get(piece.kind).build(parts, piece.scaling, piece.alpha * doubled)
    return update


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is spread over processes (a DTensor) in one piece, any other as it is."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return (gathered() if gathered is not None else tensor).detach()


def copied(tensor: Tensor) -> LazyTensor:
    """Return a copy of a tensor, on the processor; raise `IncompatibleAdapter` for one on the meta device."""
    if tensor.is_meta:
        raise IncompatibleAdapter(
            "the model is on the meta device, so its adapters have no values to be saved or copied",
            hint="Load the weights into the model first.",
        )
    return LazyTensor.of(whole(tensor).to("cpu", copy=True).contiguous())


def slice_groups(lora: Handle, name: str) -> dict[str, tuple[Piece, ...]]:
    """Return by a module's path the slices of it that an adapter trains, and that a file has as one update of it."""
    if not lora.entries[name].trainable:
        return {}  # saved as it was loaded
    return {
        path: pieces
        for path, site in lora.sites.items()
        if (pieces := site.lora.pieces.get(name)) and isinstance(site, AffineSite) and fusible(pieces, site)
    }


def save(lora: Handle, folder: str | Path, name: str, base_id: str | None, force: bool) -> Adapter:
    """Write an adapter in our format, sealed with the weights of the model; return what was written.

    Slices of a fused weight are written as one update of it, which PEFT knows.
    """
    adapter, layout = adapter_of(lora, name), Layout.of(lora.model)
    updates, whole = dict(adapter.updates), dict[str, str]()
    for path, pieces in slice_groups(lora, name).items():
        slices = [updates.pop(piece.path) for piece in pieces]
        updates[path] = fused(pieces, slices, lora.sites[path])
        whole |= dict.fromkeys((piece.path for piece in pieces), path)
    adapter = replace(adapter, updates=updates)
    if updates and all(update.replaced_rows for update in updates.values()):
        warned("%s: PEFT loads no LoRA without factors; one target besides the rows of tokens, and it does", folder)
    first = layout.first_names()
    tensors: dict[str, str] = {}
    turned: dict[str, bool] = {}
    touched: list[str] = []
    for own, child, path, parameter in lora.children():
        if own == name:
            touched.append(first[f"{path}.{parameter}" if path else parameter])
            module = whole.get(child.path, child.path)
            tensors.setdefault(module, touched[-1])
            if module in adapter.updates:
                turned[module] = lora.sites[path].turned
    stated = base_id or (adapter.base.id if adapter.base else None)
    adapter = replace(adapter, base=seal(layout, touched, stated), orientation=turned)
    writer.write(adapter, Path(folder), tensors=tensors, force=force)
    return adapter
