"""An adapter for a running model: opened from any dialect with the model's own names, in memory, its base compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import UnsupportedAdapter
from loratools.format.manifest import LAYERS
from loratools.live.place import Layout
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location

_NOWHERE = Path("the running model")


def opened(source: Location | Adapter | dialects.InMemory, layout: Layout) -> Adapter:
    """Return an adapter with all its tensors in memory.

    Raises what opening raises, and `UnsupportedAdapter` for one that changes the model's depth.
    """
    adapter = dialects.open_adapter(source, base=as_checkpoint(layout))
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
    return replace(adapter, copies={}).mapped(lambda lazy: LazyTensor.of(lazy.load()))
