"""What foreign dialects commonly cannot say: kinds of update, tensors trained whole, the base's hash, provenance."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.adapter.model import Adapter, Loss

IDENTITY = ("the hash of the base model", "provenance", "copies of the base's tensors")
"""For a dialect's `CANNOT`: what `identity` lists."""


def identity(adapter: Adapter) -> list[Loss]:
    """List the base's hash, the provenance, and copies of the base's tensors, if the adapter has them."""
    found = [*replication(adapter), *copies(adapter)]
    if adapter.base and adapter.base.sealed:
        found.append(Loss("base model", "its hash, by which a wrong base is refused"))
    if adapter.provenance:
        found.append(Loss("provenance", f"{len(adapter.provenance)} recorded operation(s)"))
    return found


def copies(adapter: Adapter) -> list[Loss]:
    """List the copies of the base's tensors that came along and were not compared with the base."""
    why = "a copy of the base's tensor came along, and only the base can tell whether it is one (--base)"
    return [Loss(path, why) for path in adapter.copies]


def replication(adapter: Adapter) -> list[Loss]:
    """List the repeated layers of the base, if the adapter was trained on such a model."""
    layers = adapter.settings.get("layer_replication")
    return (
        [Loss("layer_replication", f"its layers are those of a base with layers repeated: {layers}")] if layers else []
    )


def updates(adapter: Adapter, dialect: str, kinds: Iterable[str], parts: Iterable[str]) -> list[Loss]:
    """List the modules whose kind, or one of whose parts, a dialect has no words for."""
    kinds, parts, found = frozenset(kinds), frozenset(parts), []
    for module, update in adapter.updates.items():
        if update.kind not in kinds:
            found.append(Loss(module, f"{dialect} has no updates of kind {update.kind}"))
        elif unknown := sorted(update.parts.keys() - parts):
            found.append(Loss(module, f"{dialect} has no {', '.join(unknown)}"))
    return found


def replacements(adapter: Adapter, dialect: str) -> list[Loss]:
    """List the tensors that were trained whole."""
    return [Loss(path, f"{dialect} has no place for a tensor trained whole") for path in adapter.replacements]


def kept(adapter: Adapter, lost: Iterable[Loss]) -> Adapter:
    """Return the adapter without the modules and tensors that are lost."""
    from dataclasses import replace

    places = {loss.where for loss in lost}
    return replace(
        adapter,
        updates={module: update for module, update in adapter.updates.items() if module not in places},
        replacements={path: lazy for path, lazy in adapter.replacements.items() if path not in places},
    )
