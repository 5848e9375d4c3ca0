"""loratools' own format 1.1: one safetensors file that PEFT reads, with a manifest in its header."""

from __future__ import annotations

from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import copy_losses, left
from loratools.errors import BadFile, InvalidOption
from loratools.storage.header import Header

SUMMARY = "the loratools format 1.1: what PEFT reads, plus a manifest with scaling, base hash and provenance"
EXTRA = None
FILES = (".safetensors",)
CANNOT = ("copies of the base's tensors",)

_FILE = "adapter_model.safetensors"


def detect(listing: Listing) -> Evidence | None:
    """Find the manifest in the header of the single file, or of the folder's `adapter_model.safetensors`."""
    name, header = _header(listing)
    if header is None or "loratools" not in header.metadata:
        return None
    return Evidence(100, f"the header of {name} holds a loratools manifest")


def read(listing: Listing) -> Adapter:
    """Read by the clauses of the specification; raise `InvalidFormat` with the clause of each fault."""
    from loratools.format import reader

    if listing.alpha is not None:
        why = "this file records its scaling, and its seal covers it; weights change it in `merge` and `combine`"
        raise InvalidOption(f"{listing.path}: alpha is {listing.alpha:g}, and {why}")
    try:
        _, header = _header(listing)
    except BadFile:  # which the clauses say
        header = None
    return reader.read(listing.path, header=header)


def _header(listing: Listing) -> tuple[str, Header | None]:
    name = listing.files[0] if listing.single else _FILE
    return name, listing.header(name) if name in listing.files else None


def losses(adapter: Adapter) -> list[Loss]:
    """List updates that no registered kind says, stacks of which only the base tells how they lie, copies of the base.

    The format holds all else that an `Adapter` holds.
    """
    from loratools.format.registry import KINDS

    kinds = [
        Loss(module, f"the format registers no kind {update.kind!r}")
        for module, update in adapter.updates.items()
        if update.kind not in KINDS
    ]
    for module, update in adapter.updates.items():
        kind = KINDS.get(update.kind)
        if kind and not kind.accepts(frozenset(update.parts)):
            parts = ", ".join(sorted(update.parts))
            kinds.append(Loss(module, f"the format's kind {kind.name} has no such tensors: {parts}"))
        elif kind and (beyond := update.layout.keys() - set(kind.layout or ())):
            kinds.append(Loss(module, f"the format's kind {kind.name} does not say {', '.join(sorted(beyond))}"))
    stacks = [
        Loss(module, f"only the base tells {update.unsettled} (--base)")
        for module, update in adapter.updates.items()
        if module not in adapter.orientation and update.unsettled and update.kind in KINDS
    ]
    return [*kinds, *stacks, *copy_losses(adapter)]


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write a folder with its derived `adapter_config.json`, or the single file, which is complete by itself."""
    from loratools.format import writer

    kept = left(adapter, losses(adapter), target)
    writer.write(kept, target, force=force)
    return kept
