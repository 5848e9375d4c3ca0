"""State dicts of `torch.save`: found by their names, written with the same bytes for the same tensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

from loratools.dialects._frame.listing import Evidence, Listing
from loratools.errors import BadFile
from loratools.storage import atomic
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles import SUFFIXES


def file_of(listing: Listing) -> str | None:
    """Return the listing's file of `torch.save`, or None where there is none, or another file with tensors."""
    weights = listing.weights
    return weights[0] if len(weights) == 1 and weights[0].endswith(SUFFIXES) else None


def evidence(listing: Listing, score: int, is_part: Callable[[str], object]) -> Evidence | None:
    """Return evidence of a score where the file of `torch.save` has tensors whose names `is_part` recognises.

    Raises `BadFile` for a single file that cannot be opened safely. A file in a folder is no evidence then, since
    another dialect may read the folder.
    """
    name = file_of(listing)
    try:
        parts = [tensor for tensor in listing.tensors(name) if is_part(tensor)] if name else []
    except BadFile:
        if listing.single:
            raise
        return None
    return Evidence(score, f"{len(parts)} of the tensors in {name} are called as {parts[0]}") if parts else None


def save(target: Path, name: str, tensors: Mapping[str, LazyTensor], *, force: bool) -> None:
    """Write `target`, a file of `torch.save`, or a folder that holds it as `name`; atomically."""
    if target.suffix in SUFFIXES:
        with atomic.new_file(target, force=force) as path:
            write(path, tensors)
        return
    with atomic.new_folder(target, force=force) as folder:
        write(folder / name, tensors)


def write(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write one file, the same bytes for the same tensors."""
    import torch

    memory = io.BytesIO()  # a path would put its own name into the zip's records
    torch.save({name: lazy.load().clone() for name, lazy in sorted(tensors.items())}, memory)
    path.write_bytes(memory.getbuffer())
