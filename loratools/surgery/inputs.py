"""The inputs of a verb: paths, references to the Hub and opened values alike, one where several are expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter, AdapterInput
from loratools.adapter.placement.codes import refuse_codes
from loratools.adapter.placement.image import named_for
from loratools.decisions import warned
from loratools.errors import InvalidOption
from loratools.format.digest import checked_digest
from loratools.options import is_finite
from loratools.storage import sources
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location

AdapterSource = Location | Adapter
"""An adapter: a path, a reference such as `hf://org/name`, or an open `Adapter`."""

ModelSource = Location | Checkpoint
"""A model: a path, a reference such as `hf://org/name`, or an open `Checkpoint`."""


def open_model(model: ModelSource) -> Checkpoint:
    """Return a model, open."""
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)


def check_weights(adapters: AdapterSource | Sequence[AdapterSource], weights: object) -> None:
    """Raise `InvalidOption` as `open_adapters` does for weights, before anything is opened."""
    _weights(weights, len(as_list(adapters)))


def open_adapters(
    adapters: AdapterSource | Sequence[AdapterSource], base: Checkpoint, weights: float | Sequence[float] | None = None
) -> tuple[AdapterInput, ...]:
    """Open one adapter or several, with a weight each (1 where None), and check their digests.

    `base` tells names that some dialects leave out. Raises `InvalidOption` for weights that are not a finite number for
    each adapter, `BadFile` for an adapter whose tensors are not those that were sealed, `IncompatibleAdapter` for one
    that changes modules which the base stores as codes, and what opening raises.
    """
    each = as_list(adapters)
    numbers = _weights(weights, len(each))
    inputs = tuple(_open(adapter, weight, base) for adapter, weight in zip(each, numbers, strict=True))
    for i, opened in enumerate(inputs, 1):
        refuse_codes(opened.adapter, base, f"adapter {i}")
    tell_twice([opened.digest for opened in inputs])
    return inputs


def tell_twice(digests: Sequence[str]) -> None:
    """Warn of adapters that are in one call twice, under whichever names: their digests are the same."""
    first: dict[str, int] = {}
    for i, digest in enumerate(digests, 1):
        if first.setdefault(digest, i) != i:
            warned("adapters %d and %d have the same tensors; each is applied with its own weight", first[digest], i)


def as_list(adapters: AdapterSource | Sequence[AdapterSource]) -> list[AdapterSource]:
    """Return several adapters as a list, and one that stands alone as a list of it."""
    return list(adapters) if isinstance(adapters, Iterable) and not isinstance(adapters, str) else [adapters]


def under_names_of(base: Checkpoint, inputs: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
    """Return the inputs with their adapters under the module names of a base (image models have several namings)."""
    return tuple(replace(each, adapter=named_for(each.adapter, base)) for each in inputs)


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
    if isinstance(adapter, Adapter):
        return AdapterInput(adapter, weight, checked_digest(adapter, "adapter"))
    path = sources.local(adapter)
    opened = dialects.open_adapter(path, base=base)
    return AdapterInput(opened, weight, checked_digest(opened, str(path)), path)


def _weights(weights: Any, count: int) -> list[float]:
    listed = [1.0] * count if weights is None else list(weights) if isinstance(weights, Sequence) else [weights]
    listed = [weights] if isinstance(weights, str | bytes) else listed
    if problems := [f"weight {i + 1} is {weight!r}" for i, weight in enumerate(listed) if not is_finite(weight)]:
        raise InvalidOption("a weight is a finite number", problems)
    if not count or len(listed) != count:
        raise InvalidOption(f"{count} adapter(s) and {len(listed)} weight(s); each adapter takes one weight")
    return [float(weight) for weight in listed]
