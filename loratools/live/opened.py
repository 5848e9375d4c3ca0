"""An adapter for a running model: opened from any dialect with the model's own names, in memory, its base compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.errors import UnsupportedAdapter
from loratools.format.manifest import LAYERS
from loratools.live.place import Layout
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location, local

_NOWHERE = Path("the running model")


def opened(source: Location | Adapter, layout: Layout) -> Adapter:
    """Return an adapter with all its tensors in memory.

    Raises what opening raises, and `UnsupportedAdapter` for one that changes the model's depth.
    """
    adapter = (
        source if isinstance(source, Adapter) else dialects.open_adapter(local(source), base=as_checkpoint(layout))
    )
    if adapter.settings.get(LAYERS):
        raise UnsupportedAdapter(
            "the adapter repeats layers of its base, which a running model cannot do",
            hint="Merge it with `loratools merge`, and load the result.",
        )
    return in_memory(adapter)


def as_checkpoint(layout: Layout) -> Checkpoint:
    """Return what a dialect asks of a base, names, shapes and config, as a checkpoint without files."""
    specs = {name: TensorSpec("F32", shape, _NOWHERE, 0, 0) for name, shape in layout.shapes.items()}
    return Checkpoint(_NOWHERE, _NOWHERE, (), specs, config=layout.config)


def in_memory(adapter: Adapter) -> Adapter:
    """Return the adapter with every tensor loaded: it depends on no file any more."""
    kept: dict[int, LazyTensor] = {}

    def loaded(lazy: LazyTensor) -> LazyTensor:
        if id(lazy) not in kept:
            kept[id(lazy)] = LazyTensor.of(lazy.load())
        return kept[id(lazy)]

    updates = {
        module: rebuilt(update, {n: loaded(t) for n, t in update.parts.items()})
        for module, update in adapter.updates.items()
    }
    return replace(
        adapter, updates=updates, replacements={p: loaded(t) for p, t in adapter.replacements.items()}, copies={}
    )


def rebuilt(update: Update, parts: Mapping[str, LazyTensor]) -> Update:
    """Return an update of the same kind and scaling with other tensors."""
    from loratools.adapter import kinds

    build, layout = kinds.get(update.kind).build, dict(update.layout)
    made: Update = build(parts, update.scaling, update.alpha, **({"layout": layout} if layout else {}))
    return made
