"""Rewrite an adapter in another dialect; sealing it with its base's hash is a conversion into our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter, BaseIdentity, Loss, Step
from loratools.adapter.resolve import resolve
from loratools.adapter.tied import apply_policy
from loratools.adapter.whole import resolve_replacements
from loratools.format import manifest
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.identity import TOOL, adapter_digest


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: dialect, digest of the adapter's tensors, the base identity it carries, and what was lost."""

    output: str
    dialect: str
    digest: str
    modules: int
    base: BaseIdentity | None
    losses: tuple[Loss, ...]


def convert(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    to: str = "loratools",
    base: str | Path | Checkpoint | None = None,
    base_id: str | None = None,
    allow_loss: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """Write an adapter in the dialect `to`, sealed with the hash of `base` when one is given.

    The bytes of the factors stay as they are wherever the dialect stores them alike. Losses are refused by name unless
    `allow_loss`. Raises `LossyConversion`, `IncompatibleAdapter` when it does not fit the base, `OutputRefused`.
    """
    opened = adapter if isinstance(adapter, Adapter) else dialects.open_adapter(adapter)
    opened = replace(opened, provenance=(*opened.provenance, _step(opened, to, base is not None)))
    if base_id is not None:
        opened = replace(opened, base=replace(opened.base or BaseIdentity(), id=base_id))
    if base is not None:
        opened = seal(opened, base if isinstance(base, Checkpoint) else Checkpoint.open(base), progress)
    losses = dialects.save_adapter(opened, output, dialect=to, allow_loss=allow_loss, force=force)
    return Conversion(str(output), to, adapter_digest(opened), len(opened.updates), opened.base, tuple(losses))


def seal(adapter: Adapter, base: Checkpoint, progress: Callable[[int], None] | None = None) -> Adapter:
    """Return the adapter bound to a base: all three tiers of its hash, and the base tensor of each module.

    The `tensors` tier holds the tensors that the adapter touches. Raises `IncompatibleAdapter` if it does not fit.
    """
    untied = apply_policy((adapter,), base.specs, base.config, "both").adapters[0]
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    placements = resolve(untied, shapes, base.config)
    touched = {placement.site.tensor for placement in placements}
    paths = {name: lazy for name, lazy in resolve_replacements(untied, shapes).items() if name in shapes}
    hashes = hash_checkpoint(base, progress=progress)
    old = adapter.base or BaseIdentity()
    identity = BaseIdentity(
        old.id, old.revision, hashes.schema, {name: hashes.tensors[name] for name in sorted(touched)}, hashes.root
    )
    first: dict[str, str] = {}
    for placement in placements:
        first.setdefault(placement.module, placement.site.tensor)
    first |= {path: tensor for path, lazy in untied.replacements.items() for tensor in paths if paths[tensor] is lazy}
    return replace(adapter, base=identity, settings=_with_tensors(adapter, first))


def _with_tensors(adapter: Adapter, tensors: dict[str, str]) -> dict[str, Any]:
    """Return settings under which the format's writer finds the base tensor of each module."""
    origin = dict(adapter.settings.get(manifest.ORIGIN, {}))
    for group, paths in (("modules", adapter.updates), ("replacements", adapter.replacements)):
        old = origin.get(group, {})
        entries = {path: {**old.get(path, {}), "tensor": tensors[path]} for path in paths if path in tensors}
        if entries:
            origin[group] = {**old, **entries}
    return {**adapter.settings, manifest.ORIGIN: origin}


def _step(adapter: Adapter, to: str, sealed: bool) -> Step:
    parameters = {"from": adapter.dialect, "to": to, "sealed": sealed}
    return Step("convert", TOOL, parameters, ({"digest": adapter_digest(adapter)},))
