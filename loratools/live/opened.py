"""An adapter for a running model: opened from any dialect with the model's own names, in memory, its base compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.decisions import warned
from loratools.errors import UnsupportedAdapter
from loratools.format.manifest import LAYERS
from loratools.live.place import Layout
from loratools.storage import dtypes, files
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
    return in_memory(settled(adapter, layout))


def as_checkpoint(layout: Layout) -> Checkpoint:
    """Return what a dialect asks of a base, names, shapes and config, as a checkpoint without files."""
    specs = {name: TensorSpec("F32", shape, _NOWHERE, 0, 0) for name, shape in layout.shapes.items()}
    return Checkpoint(_NOWHERE, _NOWHERE, (), specs, config=layout.config)


def in_memory(adapter: Adapter) -> Adapter:
    """Return the adapter with every tensor loaded: it depends on no file any more.

    What a file has is read in one piece, of which the tensors are views.
    """
    spans: dict[Path, tuple[int, int]] = {}
    for lazy in adapter.tensors().values():
        if lazy.spec is not None:
            start, stop = spans.get(lazy.spec.file, (lazy.spec.start, lazy.spec.stop))
            spans[lazy.spec.file] = min(start, lazy.spec.start), max(stop, lazy.spec.stop)
    pieces = {
        path: files.read_bytes(TensorSpec("U8", (stop - start,), path, start, stop))
        for path, (start, stop) in spans.items()
    }

    def loaded(lazy: LazyTensor) -> LazyTensor:
        spec = lazy.spec
        if spec is None or spec.nbytes == 0 or spec.nbytes % (size := dtypes.bits(spec.dtype) // 8 or 1):
            return LazyTensor.of(lazy.load())
        offset = spec.start - spans[spec.file][0]
        if offset % size:  # torch wants numbers where they are aligned
            return LazyTensor.of(lazy.load())
        count = spec.nbytes // size
        flat = torch.frombuffer(pieces[spec.file], dtype=dtypes.to_torch(spec.dtype), count=count, offset=offset)
        return LazyTensor.of(flat.view(spec.shape))

    return replace(adapter, copies={}).mapped(loaded)


def settled(adapter: Adapter, layout: Layout) -> Adapter:
    """Return the adapter without its copies of the model's own tensors; another tensor takes the model's place, as in
    PEFT, which is said.
    """
    if not adapter.copies:
        return adapter
    names, own = Names(layout.shapes, layout.config), dict(adapter.replacements)
    for path, copy in adapter.copies.items():
        module, _, parameter = path.rpartition(".")
        named = names.find(module, parameter)
        if len(named) == 1 and layout.shapes[named[0]] == copy.shape:
            _, owner, key = layout.owners[named[0]]
            held, W = copy.load(), owner._parameters.get(key)
            if W is not None and not W.is_meta and (torch.equal(held.to(W), W) or torch.equal(W.to(held), held)):
                continue
        warned("the adapter's own %s takes the place of the model's, as in PEFT", path)
        own[path] = copy
    return replace(adapter, replacements=own, copies={})
