"""Rewrite an adapter in another dialect; sealing it with its base's hash is a conversion into our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter, AdapterInput, BaseIdentity, Loss, Step
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.resolve import resolve
from loratools.adapter.placement.settle import settle
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.whole import resolve_replacements
from loratools.dialects.peft import profiles
from loratools.errors import IncompatibleAdapter
from loratools.format import manifest
from loratools.format.digest import adapter_digest
from loratools.format.manifest import NO_DIGEST
from loratools.format.record import TOOL
from loratools.parallel import Progress
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_checkpoint

BASE_CONFIG = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
"""Fields of a base's config.json that an adapter keeps as `settings["base_config"]`: GGUF's layout depends on them."""


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
    profile: str | None = None,
    allow_loss: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter in the dialect `to`; with a `base`, sealed with its hash where the dialect can record one.

    The base also tells what some dialects need to know (`BASE_CONFIG`). `profile` makes the adapter as one consumer of
    PEFT adapters reads it (`serving`, `vllm`, `sglang`). The bytes of the factors stay as they are wherever the dialect
    stores them alike. Losses are refused by name unless `allow_loss`. Raises `LossyConversion`, `IncompatibleAdapter`
    when it does not fit the base, `OutputRefused`, `UnknownKind`.
    """
    checkpoint = base if isinstance(base, Checkpoint) or base is None else Checkpoint.open(base)
    opened = adapter if isinstance(adapter, Adapter) else dialects.open_adapter(adapter, base=checkpoint)
    checkpoint = checkpoint and replicated(checkpoint, [opened])
    records = _records(to)
    if records:
        opened = replace(opened, provenance=(*opened.provenance, _step(opened, to, base is not None)))
    if base_id is not None:
        opened = replace(opened, base=replace(opened.base or BaseIdentity(), id=base_id))
    if checkpoint is not None:
        opened = _with_config(settle(checkpoint, [AdapterInput(opened)])[0][0].adapter, checkpoint)
        named = named_for(opened, checkpoint)
        if records:
            opened = seal(named, checkpoint, progress)
        else:
            _check_fits(named, checkpoint)
    if profile is not None:
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()} if checkpoint else None
        opened = profiles.apply(opened, profile, shapes)
    losses = dialects.save_adapter(opened, output, dialect=to, allow_loss=allow_loss, force=force)
    return Conversion(str(output), to, adapter_digest(opened), len(opened.updates), opened.base, tuple(losses))


def seal(adapter: Adapter, base: Checkpoint, progress: Progress | None = None) -> Adapter:
    """Return the adapter bound to a base: all three tiers of its hash, and the base tensor of each module.

    The `tensors` tier holds the tensors that the adapter touches. Raises `IncompatibleAdapter` if it does not fit.
    """
    if base.origins:
        raise IncompatibleAdapter("the format 1.0 has no words for a base with repeated layers (layer_replication)")
    untied = apply_policy((adapter,), base.specs, base.config, "both").adapters[0]
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    whole = resolve_replacements(untied, shapes)
    placements = resolve(untied, shapes | {name: lazy.shape for name, lazy in whole.items()}, base.config)
    paths = {name: lazy for name, lazy in whole.items() if name in shapes}
    touched = {placement.site.tensor for placement in placements} | paths.keys()
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


def _records(dialect: str) -> bool:
    """Tell whether a dialect can record a base's hash and the provenance: ask it about an adapter of nothing else."""
    probe = Adapter({}, base=BaseIdentity(root=NO_DIGEST), provenance=(Step("convert", TOOL),))
    lost = {loss.where for loss in dialects.get(dialect).losses(probe)}
    return not lost & {"base model", "provenance"}


def _with_config(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with what the base's config.json says of its architecture and heads."""
    inner = base.config.get("text_config")
    config = {**base.config, **inner} if isinstance(inner, Mapping) else base.config
    said = {name: config[name] for name in BASE_CONFIG if isinstance(config.get(name), str | int)}
    return replace(adapter, settings={**adapter.settings, "base_config": said}) if said else adapter


def _check_fits(adapter: Adapter, base: Checkpoint) -> None:
    """Raise `IncompatibleAdapter` unless the adapter fits the base."""
    untied = apply_policy((adapter,), base.specs, base.config, "both").adapters[0]
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    whole = resolve_replacements(untied, shapes)
    resolve(untied, shapes | {name: lazy.shape for name, lazy in whole.items()}, base.config)


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
