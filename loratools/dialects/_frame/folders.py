"""Adapters in the folders below one that holds none: a trainer's checkpoints, a module of a sentence-transformer, …

The only one is taken, which is said; of several none is guessed, and of checkpoints the newest is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loratools.adapter.naming.compact import natural
from loratools.adapter.parts import factors_of, is_textual_inversion
from loratools.decisions import warned
from loratools.dialects._frame.listing import Listing
from loratools.errors import BadFile, UnknownKind
from loratools.storage.pickles import EMBEDDING, SUFFIXES

MAX_FOLDERS, MAX_DEPTH = 1_000, 4
"""Folders that are looked into, and how far below: mistral-finetune has checkpoints/checkpoint_000010/consolidated."""

_STEP = r"(?:checkpoint|step|epoch)[-_]?(\d+)"
_STATE = r"global_step\d+|\..*|__pycache__"  # DeepSpeed's shares of the optimizer, caches


def only_below(listing: Listing, knows: Callable[[Listing], bool]) -> Listing:
    """Return the listing of the only adapter in the folders below, and warn of it; the same where there is none.

    `knows` tells whether a dialect reads a listing. Raises `UnknownKind` where there are several, or where the folder
    itself holds weights.
    """
    below = [] if listing.single else list(_adapters(listing, knows))
    if not below:
        return listing
    names = [each.folder.relative_to(listing.folder).as_posix() for each in below]
    if len(below) == 1 and not listing.own_weights:
        warned("%s: no adapter in this folder; the only one below it is taken, %s", listing.path, names[0])
        return below[0]
    listing.check()
    many = f"{len(names)} adapters are in its folders" if len(names) > 1 else "an adapter is in one of its folders"
    newest = max(names, key=_step) if len(names) > 1 and all(_step(name) >= 0 for name in names) else None
    which = f"the newest checkpoint is {listing.folder / newest}" if newest else f"such as {listing.folder / names[0]}"
    raise UnknownKind(
        f"{listing.path}: no adapter in this folder, and {many}", names[:20], hint=f"Give the folder of one: {which}"
    )


def _adapters(listing: Listing, knows: Callable[[Listing], bool]) -> Iterator[Listing]:
    for folder in _folders(listing.folder):
        try:
            each = replace(listing, path=folder, folder=folder, files=Listing.of(folder).files, _read={})
            known = knows(each)
        except BadFile:
            known = (folder / "adapter_config.json").is_file()  # reading it tells what is wrong
        if known:
            yield each


def _folders(top: Path) -> Iterator[Path]:
    """Yield the folders below one, in natural order; a link is none, nor is what a trainer keeps of its state."""
    left: list[tuple[Path, int]] = [(top, 0)]
    for count, (folder, depth) in enumerate(left):
        if count > MAX_FOLDERS:
            return
        if depth:
            yield folder
        if depth < MAX_DEPTH:
            inside = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            left += [
                (folder / name, depth + 1) for name in sorted(inside, key=natural) if not re.fullmatch(_STATE, name)
            ]


def _step(name: str) -> int:
    """Return the step of a checkpoint by its folder's name, -1 for another folder."""
    return max((int(match[1]) for part in Path(name).parts if (match := re.fullmatch(_STEP, part))), default=-1)


def several(listing: Listing, reasons: Sequence[tuple[str, str]]) -> UnknownKind:
    """Return the error for what several dialects know equally well: their names, with the reason of each."""
    return UnknownKind(
        f"{listing.path}: can be read as {' or as '.join(name for name, _ in reasons)}",
        [f"{name}: {reason}" for name, reason in reasons],
        hint="Say which one it is: name the dialect.",
    )


def unknown(listing: Listing, known: Sequence[str]) -> UnknownKind:
    """Return the error for what no dialect reads, with what was seen and what is `known`."""
    if not listing.single and len(own := _adapters_in(listing)) > 1:
        shown = ", ".join(own[:6]) + (f" and {len(own) - 6} more" if len(own) > 6 else "")
        hint = f"Name one of them, or give --each {listing.path} to a command that takes many."
        return UnknownKind(f"{listing.path}: {len(own)} files of adapters: {shown}", hint=hint)
    lone = listing.own_weights if len(listing.own_weights) == 1 else []
    tensors = listing.tensors(lone[0]) if lone and lone[0].endswith((".safetensors", *SUFFIXES)) else {}
    if is_textual_inversion({name: lazy.shape for name, lazy in tensors.items()}):
        return embedding(listing)
    if factors := listing.factors:
        what = f"an adapter, with {len(factors)} factors such as {factors[0]}, whose names no dialect has"
        return UnknownKind(f"{listing.path}: {what}; loratools reads", known)
    hint = f"Give the adapter's folder or file; `loratools inspect {listing.path}` describes a model."
    header = listing.header(listing.files[0]) if listing.single else None
    if header and any(name.endswith(".weight") for name in header.tensors):
        return UnknownKind(f"{listing.path} looks like weights of a base model; an adapter was expected", hint=hint)
    lists = "`loratools dialects` lists what loratools reads."
    if listing.single and not listing.weights:
        return UnknownKind(f"{listing.path}: no file of weights; an adapter was expected", hint=lists)
    if listing.single:
        return UnknownKind(f"{listing.path}: no dialect knows this file; loratools reads", known)
    more = f" and {len(listing.files) - 12} more" if len(listing.files) > 12 else ""
    holds = f"it holds {', '.join(listing.files[:12]) + more or 'no files'}"
    if "config.json" in listing.files:
        return UnknownKind(f"{listing.path} looks like a base model; an adapter was expected; {holds}", hint=hint)
    if not listing.weights:
        return UnknownKind(f"{listing.path}: no dialect knows this folder; {holds}", hint=lists)
    return UnknownKind(f"{listing.path}: no dialect knows this folder; {holds}; loratools reads", known)


def embedding(listing: Listing) -> UnknownKind:
    """Return the error for a textual inversion where an adapter or a model was expected."""
    return UnknownKind(f"{listing.path}: {EMBEDDING}", hint="It has a new word for the prompt, and changes no weight.")


def _adapters_in(listing: Listing) -> list[str]:
    """Return the files of a folder whose tensors are mostly factors, where nothing says that they are one adapter."""
    headers = {name: header for name in listing.weights if (header := listing.header(name))}
    if "adapter_config.json" in listing.files or any(name.endswith(".index.json") for name in listing.files):
        return []
    return [name for name, header in headers.items() if factors_of(header.tensors)]
