"""Hugging Face PEFT: `adapter_config.json` beside `adapter_model.safetensors`, or the older `.bin`.

This dialect follows PEFT 0.21 to the letter; the kinds of update decide what a module's tensors mean.

    assemble   an adapter of tensors and a config
    config     a config without faults, and the scalings that it gives
    fields     what each field of a config means: implemented, harmless, or refused with a reason
    targets    which modules a config targets
    patterns   names and regular expressions of a config, matched in bounded time
    isolated   Python's own `re` in a process of its own, which ends when it takes too long
    names      the names in a file, in whatever state a trainer left them
    checks     what must agree: tensors with each other, and with the config
    experts    which parameter each wrapper around a stack of experts is for
    profiles   what consumers ask beyond PEFT: serving, vLLM, SGLang
    typed      an adapter of another type than LORA
    order      the modules of a base in the order of its code, for what is drawn for one after the other
    types      those types, one file each
    alone      a single file without its config
    typed_names, typed_write
               what the tensors of such an adapter are called, and its files
    held       an adapter that is no file: a state dict with a config, a PeftModel, the handle of a running model
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.build import check_gathered
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import left, record_losses
from loratools.dialects._frame.metadata import carried, settings_with
from loratools.dialects.peft import alone, checks
from loratools.dialects.peft.alone import is_part, stated_config
from loratools.dialects.peft.assemble import assemble
from loratools.dialects.peft.fields import is_typed
from loratools.dialects.peft.names import unwrap
from loratools.errors import BadFile
from loratools.format import keys, manifest
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles import SUFFIXES

SUMMARY = "Hugging Face PEFT: adapter_config.json beside adapter_model.safetensors or .bin"
EXTRA = None
FILES = ()
CANNOT = ("the hash of the base model", "provenance", "DoRA on some modules and not on others")

_CONFIG = "adapter_config.json"
_STEM = "adapter_model"
_SHARD = r"adapter_model-(\d{5})-of-(\d{5})\.(safetensors|bin)"


def detect(listing: Listing) -> Evidence | None:
    """Look for `peft_type` in the config, and for PEFT's names in the header."""
    config = listing.json(_CONFIG)
    stated = config is not None and "peft_type" in config
    files = _files(listing)
    if listing.single and not listing.path.name.endswith((".safetensors", *SUFFIXES)):
        return None
    header = listing.header(files[0]) if files else None
    count = sum(1 for name in header.tensors if (split := keys.split(unwrap(name))) and split[1]) if header else 0
    if count:
        names = f"{count} of the tensors in {files[0]} have PEFT's names"
        return Evidence(90, f"{_CONFIG} has peft_type, and {names}") if stated else Evidence(60, names)
    if stated:
        return Evidence(40 if header else 80, f"{_CONFIG} has peft_type")
    bare = [name for name in header.tensors if is_part(name)] if listing.single and header else []
    # Factors are the weights of linear layers in PEFT, and most of an adapter's tensors are factors.
    if any(name.endswith(".weight") for name in bare) and listing.factors:
        return Evidence(30, f"{len(bare)} of the tensors in {files[0]} end as PEFT's factors do, such as {bare[0]}")
    return None


def read(listing: Listing) -> Adapter:
    """Read an adapter; every tensor becomes part of an update, or is named in an exception.

    Scaling is α/r, or α/√r with rsLoRA, with r from the tensor and α by PEFT's first-match rule. Raises `BadFile` for
    what is damaged or contradicts itself, `UnsupportedAdapter` for what is sound and not read; all problems at once.
    """
    tensors: Mapping[str, LazyTensor] = _tensors(listing)
    path, document = listing.folder / _CONFIG, listing.json(_CONFIG)
    header = _header(listing)
    document = stated_config(header) if document is None else document
    if document is None and (listing.single or listing.alpha is not None):
        adapter = alone.read(listing, tensors, header)
        return replace(adapter, settings=_entries(header))
    if document is None:
        raise BadFile(
            f"{path}: no such file, and without it the scaling is unknown",
            hint=f"Put the {_CONFIG} that was saved with {_files(listing)[0]} beside it, or give the file "
            "itself, which is read at scale 1, or the alpha of its training.",
        )
    if is_typed(document):
        from loratools.dialects.peft import typed

        tensors = typed.present(tensors, document)
    check_gathered(listing.path, tensors, checks.is_flat)
    adapter = assemble(
        listing.path, tensors, document, path, initial=listing.initial, alpha=listing.alpha, base=listing.base
    )
    return replace(adapter, settings={**adapter.settings, **_entries(header)})


def losses(adapter: Adapter) -> list[Loss]:
    """List what neither PEFT's tensors nor its config can say."""
    return [*(Loss(module, reason) for module, reason in _unsayable(adapter).items()), *record_losses(adapter)]


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write `adapter_model.safetensors` and the `adapter_config.json` derived from it, byte-reproducibly."""
    from loratools.dialects.peft import typed_write
    from loratools.dialects.peft.experts import version_for
    from loratools.format.peft_config import derive_config

    kept = left(adapter, losses(adapter), target)
    if (module := typed_write.type_of(kept)) is not None:
        files = typed_write.files_of(kept, module)
        return _write(kept, target, files.tensors, files.config, force)
    updates = kept.updates
    tensors = {
        keys.join(module, part): lazy for module, update in updates.items() for part, lazy in update.parts.items()
    }
    for whole in (adapter.replacements, adapter.copies):
        names = manifest.names_of({"replacements": whole, "modules": updates})
        tensors |= {name: whole[path] for path, name in names.items()}
    # Trained rows are no target, they have a field of their own.
    rows = {module: list(update.replaced_rows) for module, update in updates.items() if update.replaced_rows}
    settings = {**adapter.settings, "trainable_token_indices": rows} if rows else adapter.settings
    targets = {module: update for module, update in updates.items() if module not in rows}
    sayable = Adapter(targets, adapter.replacements, adapter.base, settings=settings)
    # Nothing else in the files says which PEFT they are for, and versions differ in how they take stacks.
    version = {"peft_version": stacks_for} if (stacks_for := version_for(targets)) else {}
    return _write(kept, target, tensors, derive_config(sayable) | version, force)


def _write(
    adapter: Adapter, target: Path, tensors: Mapping[str, LazyTensor], document: Mapping[str, Any], force: bool
) -> Adapter:
    """Write the two files, and return the adapter that is in them."""
    from loratools.storage import atomic, save

    config = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic.new_folder(target, force=force) as folder:
        (folder / _CONFIG).write_text(config + "\n", encoding="utf-8", newline="\n")
        save.write(folder / f"{_STEM}.safetensors", tensors, {**carried(adapter, tensors, "format"), "format": "pt"})
    return adapter


def _files(listing: Listing) -> list[str]:
    """Return the names of the files that hold the adapter: as PEFT looks for them, or shards, or the single file."""
    if listing.single:
        return list(listing.files)
    for ending in (".safetensors", ".bin"):
        if _STEM + ending in listing.files:
            return [_STEM + ending]
        if shards := [name for name in listing.files if name.endswith(ending) and _shard(name)]:
            return shards
    return []


def _header(listing: Listing) -> Mapping[str, str]:
    """Return the entries of the header, {} of a pickle's."""
    header = listing.header(_files(listing)[0])
    return header.metadata if header else {}


def _entries(header: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that hold the entries of the header: trigger phrase, tags, …, of an adapter of images."""
    return settings_with(header, lambda name: name not in ("format", manifest.METADATA_KEY))


def _shard(name: str) -> re.Match[str] | None:
    """Return the number of a shard, how many there are, and the ending, by the name of a file."""
    return re.fullmatch(_SHARD, name) if name.startswith(f"{_STEM}-") else None


def _compare(listing: Listing, single: str) -> None:
    """Raise `BadFile` where shards beside the single file, which PEFT takes, hold other tensors."""
    ending = Path(single).suffix
    shards = [name for name in listing.files if name.endswith(ending) and _shard(name)]
    if listing.single or not shards or single in shards:
        return
    from loratools.storage.files import same_bytes

    inside = listing.tensors(single)
    parts: dict[str, LazyTensor] = {}
    for name in shards:
        parts |= listing.tensors(name)
    pairs = [(lazy.spec, parts[name].spec) for name, lazy in inside.items() if name in parts]
    if parts.keys() != inside.keys() or not all(a and b and same_bytes(a, b) for a, b in pairs):
        raise BadFile(
            f"{listing.path}: two adapters in one folder: {single}, which PEFT takes, and {', '.join(shards[:12])}",
            hint="Remove those that are not the adapter's, or give the path of one file.",
        )


def _tensors(listing: Listing) -> dict[str, LazyTensor]:
    """Return all tensors under the names in the files; shards are joined."""
    files = _files(listing)
    if not files:
        listing.check()
        shown = ", ".join(listing.files[:12]) or "no files"
        raise BadFile(f"{listing.path}: no {_STEM}.safetensors or {_STEM}.bin in this folder; it holds {shown}")
    _compare(listing, files[0])
    if shard := _shard(files[0]):
        if listing.single:
            raise BadFile(f"{listing.path}: this is one shard of several", hint=f"Give the folder: {listing.folder}")
        count, ending = int(shard[2]), shard[3]
        wanted = [f"{_STEM}-{i:05d}-of-{count:05d}.{ending}" for i in range(1, count + 1)]
        if missing := sorted(set(wanted) - set(files)):
            raise BadFile(
                f"{listing.path}: missing {'shard' if len(missing) == 1 else 'shards'}: {', '.join(missing[:12])}"
            )
        if extra := sorted(set(files) - set(wanted)):
            raise BadFile(f"{listing.path}: shards of two savings: {', '.join(extra[:12])} do not belong to {files[0]}")
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        inside = listing.tensors(name)
        if twice := sorted(inside.keys() & tensors.keys()):
            raise BadFile(f"{listing.folder / name}: {twice[0]} is in another shard too")
        tensors |= inside
    return tensors


def _unsayable(adapter: Adapter) -> dict[str, str]:
    """Return the modules whose update PEFT has no words for, and why."""
    from loratools.dialects.peft import typed_write

    reasons: dict[str, str] = {}
    if typed_write.type_of(adapter) is not None:
        return reasons
    for module, update in adapter.updates.items():
        if unknown := sorted(update.parts.keys() - keys.PARTS.keys()):
            reasons[module] = f"PEFT's LORA has no {', '.join(unknown)} (kind {update.kind})"
    updates = adapter.updates.items()
    if scaled := {module for module, update in updates if "lora_magnitude_vector" in update.parts}:
        plain = sorted(module for module, update in updates if update.rank and module not in scaled | reasons.keys())
        reasons |= dict.fromkeys(plain, "it has no magnitude, and PEFT's use_dora is one switch for all modules")
    return reasons
