"""The inputs of a verb: paths, references to the Hub and opened values alike, one where several are expected."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratools import dialects
from loratools.adapter.input import AdapterInput
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.parts import factors_of
from loratools.adapter.placement.codes import refuse_codes
from loratools.decisions import warned
from loratools.dialects._frame.facts import facts_of
from loratools.dialects._frame.metadata import metadata_of
from loratools.errors import InvalidOption, UnsupportedAdapter, counted
from loratools.format.digest import checked_digest
from loratools.options import is_finite
from loratools.storage import atomic, sources
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location

if TYPE_CHECKING:
    import torch

AdapterSource = Location | Adapter | dialects.InMemory
"""An adapter: a path, a reference such as `hf://org/name`, an open `Adapter`, or one held in memory."""

ModelSource = Location | Checkpoint
"""A model: a path, a reference such as `hf://org/name`, or an open `Checkpoint`."""


Weights = float | str | Sequence[float | str] | None
"""The weights of adapters: a number each, or a text with a number for each module or block; None: 1 for each."""


def open_model(model: ModelSource) -> Checkpoint:
    """Return a model, open; raise `UnsupportedAdapter` for a file of factors, which is none."""
    opened = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    if factors := factors_of(opened.specs):
        raise UnsupportedAdapter(
            f"{opened.path}: an adapter, with {len(factors)} factors such as {factors[0]}; a model was expected"
        )
    return opened


def check_weights(adapters: AdapterSource | Sequence[AdapterSource], weights: object) -> None:
    """Raise `InvalidOption` as `open_adapters` does for weights, before anything is opened."""
    _weights(weights, len(as_list(adapters)))


def open_adapters(
    adapters: AdapterSource | Sequence[AdapterSource], base: Checkpoint,
    weights: Weights = None, *, together: bool = True,
) -> tuple[AdapterInput, ...]:  # fmt: skip
    """Open one adapter or several, with a weight each (1 where None), and check their digests.

    `base` tells names that some dialects leave out; `together` says that they act together, so that one given twice is
    worth a warning. Raises `InvalidOption` for weights that are not a finite number for
    each adapter, `BadFile` for an adapter whose tensors are not those that were sealed, `IncompatibleAdapter` for one
    that changes modules which the base stores as codes, and what opening raises.
    """
    each = as_list(adapters)
    numbers = _weights(weights, len(each))
    inputs = tuple(
        _open(adapter, 1.0, base) if isinstance(weight, str) else _open(adapter, weight, base)
        for adapter, weight in zip(each, numbers, strict=True)
    )
    inputs = tuple(
        weighed(opened, weight, f"adapter {i}") if isinstance(weight, str) else opened
        for i, (opened, weight) in enumerate(zip(inputs, numbers, strict=True), 1)
    )
    for i, opened in enumerate(inputs, 1):
        refuse_codes(opened.adapter, base, f"adapter {i}")
    if together:
        tell_twice([opened.digest for opened in inputs])
    return inputs


def weighed(opened: AdapterInput, words: str, name: str) -> AdapterInput:
    """Return an adapter with the weights of its modules in their scalings; raise what `scaled` raises."""
    from loratools.adapter.weights.scaled import scaled  # most weights are numbers

    return replace(opened, adapter=scaled(opened.adapter, words, name), weight=1.0, words=words)


def tell_twice(digests: Sequence[str]) -> None:
    """Warn of adapters that are in one call twice, under whichever names: their digests are the same."""
    first: dict[str, int] = {}
    for i, digest in enumerate(digests, 1):
        if first.setdefault(digest, i) != i:
            warned("adapters %d and %d have the same tensors; each is applied with its own weight", first[digest], i)


def as_list(adapters: AdapterSource | Sequence[AdapterSource]) -> list[AdapterSource]:
    """Return several adapters as a list, and one that stands alone, also a pair (state dict, config), as a list."""
    alone = isinstance(adapters, str | Mapping | Adapter) or not isinstance(adapters, Iterable)
    if alone or dialects.is_pair(adapters):
        return [cast(AdapterSource, adapters)]
    return list(cast(Sequence[AdapterSource], adapters))


def names_of(adapters: Sequence[AdapterSource]) -> list[str]:
    """Return what messages call adapters: their paths, or their numbers where they came open."""
    each = enumerate(adapters, 1)
    return [str(adapter) if isinstance(adapter, str | os.PathLike) else f"adapter {i}" for i, adapter in each]


def under_names_of(base: Checkpoint, inputs: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
    """Return the inputs with their adapters under the module names of a base (image models have several namings)."""
    names = Names(base.specs, base.config)
    if all(_has(names, each.adapter, base) for each in inputs):
        return tuple(inputs)
    from loratools.adapter.placement.image import named_for  # imports all that is known of image models

    return tuple(replace(each, adapter=named_for(each.adapter, base)) for each in inputs)


def _has(names: Names, adapter: Adapter, base: Checkpoint) -> bool:
    """Tell whether a base has an adapter's modules by their names, so that no naming of image models is asked."""
    if not all(map(names.find, adapter.updates)):
        return False
    # Rows of q, k and v in one weight may lie by heads in the shards of an image model.
    fused = len(base.shards) > 1 and any("qkv" in module.rpartition(".")[2] for module in adapter.updates)
    return not fused or names.loaded is not None


def places_of(model: Checkpoint) -> list[Path]:
    """Return where a model lies: its folder, and the files of its tensors, which may be links to elsewhere."""
    return [model.path, *([model.root] if model.path.is_dir() else []), *(shard.path for shard in model.shards)]


def places(inputs: Sequence[AdapterInput]) -> Iterator[Path]:
    """Yield where inputs lie: an adapter that came open is known by its files alone."""
    for each in inputs:
        if each.path is not None:
            yield each.path
        yield from sorted({lazy.spec.file for lazy in each.adapter.tensors().values() if lazy.spec})


def _open(adapter: AdapterSource, weight: float, base: Checkpoint) -> AdapterInput:
    if not isinstance(adapter, str | os.PathLike):
        value = dialects.open_adapter(adapter, base=base)
        if value.tensors() and all(lazy.spec is None and lazy.file is None for lazy in value.tensors().values()):
            value = in_a_file(value)
        return AdapterInput(value, weight, checked_digest(value, "adapter"))
    location, dialect, alpha = dialects.told(adapter, None, None)
    path = sources.local(location)
    opened = dialects.open_adapter(path, dialect=dialect, alpha=alpha, base=base)
    repository, commit = sources.origin(path)
    name = repository if commit else facts_of(metadata_of(opened)).title  # a folder may have any name
    return AdapterInput(opened, weight, checked_digest(opened, str(path)), path, name=name, commit=commit)


def in_a_file(adapter: Adapter) -> Adapter:
    """Return an adapter of memory alone with its tensors in a temporary file, which goes away with the last of them.

    It is merged by the path that an adapter in files takes then, to the same bytes; a tensor trained whole is copied
    from there.
    """
    from loratools.storage import save

    folder = _Folder()
    path = folder.path / "adapter.safetensors"
    lazies = [*adapter.tensors().values(), *adapter.copies.values()]
    tensors = list({id(lazy): lazy for lazy in lazies}.values())
    save.write(path, {str(i): lazy for i, lazy in enumerate(tensors)}, {})
    specs = read_header(path).tensors
    stored = {id(lazy): LazyTensor.stored(specs[str(i)]) for i, lazy in enumerate(tensors)}
    return adapter.mapped(lambda lazy: replace(stored[id(lazy)], load=partial(folder.load, stored[id(lazy)])))


class _Folder:
    """A temporary folder that is there as long as anything can load a tensor from it."""

    def __init__(self) -> None:
        resources = ExitStack()
        self.path = resources.enter_context(atomic.temporary("adapter"))
        weakref.finalize(self, resources.close)

    def load(self, lazy: LazyTensor) -> torch.Tensor:
        """Load one of its tensors."""
        return lazy.load()


def _weights(weights: Any, count: int) -> list[float | str]:
    listed = [1.0] * count if weights is None else list(weights) if isinstance(weights, Sequence) else [weights]
    listed = [weights] if isinstance(weights, str | bytes) else listed
    read = [_read(weight) for weight in listed]
    if problems := [f"weight {i + 1} is {weight!r}" for i, weight in enumerate(listed) if read[i] is None]:
        raise InvalidOption("a weight is a finite number", problems)
    if not count or len(listed) != count:
        raise InvalidOption(
            f"{counted(count, 'adapter')} and {counted(len(listed), 'weight')}; each adapter takes one weight"
        )
    return [weight for weight in read if weight is not None]


def _read(weight: Any) -> float | str | None:
    """Return a weight that is one number as that, one that differs among modules as its words; None for none."""
    if is_finite(weight):
        return float(weight)
    if not isinstance(weight, str) or not any(mark in weight for mark in "=,:"):
        return None
    from loratools.adapter.weights import Weight

    return None if Weight.parse(weight).plain else weight
