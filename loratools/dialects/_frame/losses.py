"""What foreign dialects commonly cannot say: kinds of update, tensors trained whole, the base's hash, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from loratools.adapter.model import Adapter, BaseIdentity, Loss
from loratools.errors import LossyConversion, UnsupportedAdapter, counted

IDENTITY = ("the hash of the base model", "provenance", "copies of the base's tensors")
"""For a dialect's `CANNOT`: what `identity_losses` lists."""

_HASH = Loss("base model", "its hash, by which a wrong base is refused")


def identity_losses(adapter: Adapter) -> list[Loss]:
    """List repeated layers, copies of the base's tensors, the base's hash, the provenance."""
    return [*replication_losses(adapter), *copy_losses(adapter), *record_losses(adapter)]


def record_losses(adapter: Adapter) -> list[Loss]:
    """List the base's hash and the provenance."""
    losses = []
    if adapter.base and adapter.base.sealed:
        losses.append(_HASH)
    if adapter.provenance:
        losses.append(Loss("provenance", counted(len(adapter.provenance), "recorded operation")))
    return losses


def name_losses(adapter: Adapter) -> list[Loss]:
    """List the name of the base model."""
    return [Loss("base model", f"its name, {adapter.base.id}")] if adapter.base and adapter.base.id else []


def kept_identity(adapter: Adapter, losses: Iterable[Loss]) -> BaseIdentity | None:
    """Return what an output says of the base model of an adapter: its identity without what is lost of it."""
    base = adapter.base
    if base and _HASH in losses:
        base = BaseIdentity(base.id, base.revision)
    return replace(base, id=None, revision=None) if base and {*name_losses(adapter)} & {*losses} else base


def copy_losses(adapter: Adapter) -> list[Loss]:
    """List the copies of the base's tensors that came along and were not compared with the base."""
    why = "a copy of the base's tensor came along, and only the base can tell whether it is one (--base)"
    return [Loss(path, why) for path in adapter.copies]


def replication_losses(adapter: Adapter) -> list[Loss]:
    """List the repeated layers of the base, if the adapter was trained on such a model."""
    layers = adapter.settings.get("layer_replication")
    what = f"its layers are those of a base with layers repeated: {layers}"
    return [Loss("layer_replication", what)] if layers else []


def no_kind(dialect: str, kind: str) -> str:
    """Say that a dialect has no updates of a kind: what is lost of each such module."""
    return f"{dialect} has no updates of kind {kind}"


def update_losses(adapter: Adapter, dialect: str, kinds: Iterable[str], parts: Iterable[str]) -> list[Loss]:
    """List the modules whose update a dialect has no words for: it has only these kinds, and these parts of them."""
    kinds, parts, losses = frozenset(kinds), frozenset(parts), []
    for module, update in adapter.updates.items():
        if update.kind not in kinds:
            losses.append(Loss(module, no_kind(dialect, update.kind)))
        elif unknown := sorted(update.parts.keys() - parts):
            losses.append(Loss(module, f"{dialect} has no {', '.join(unknown)}"))
    return losses


def replacement_losses(adapter: Adapter, dialect: str) -> list[Loss]:
    """List the tensors that were trained whole."""
    return [Loss(path, f"{dialect} has no place for a tensor trained whole") for path in adapter.replacements]


def common_losses(adapter: Adapter, dialect: str, *, named: bool = True) -> list[Loss]:
    """List tensors trained whole, the base's name unless the dialect has `named` it, and its identity."""
    name = [] if named else name_losses(adapter)
    return [*name, *replacement_losses(adapter, dialect), *identity_losses(adapter)]


def read_only(why: str) -> tuple[Callable[[Adapter], list[Loss]], Callable[..., Adapter]]:
    """Return `losses` and `write` of a dialect that is only read here: the whole adapter is a loss."""
    loss = Loss("adapter", why)

    def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
        raise UnsupportedAdapter(f"{target}: {loss}")

    return lambda _: [loss], write


def left(adapter: Adapter, losses: Iterable[Loss], target: Path) -> Adapter:
    """Return the adapter without what is lost; raise `LossyConversion` where that is everything."""
    rest = without(adapter, losses := list(losses))
    if not rest.updates and not rest.replacements:
        raise LossyConversion(f"{target}: nothing of this adapter would be left to write", [str(x) for x in losses])
    return rest


def without(adapter: Adapter, losses: Iterable[Loss]) -> Adapter:
    """Return the adapter without the modules and tensors that are lost."""
    places = {loss.where for loss in losses}
    return replace(
        adapter,
        updates={module: update for module, update in adapter.updates.items() if module not in places},
        replacements={path: lazy for path, lazy in adapter.replacements.items() if path not in places},
    )
