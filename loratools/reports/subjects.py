"""What a page is made of: its inputs, opened, each with the name that the page calls it by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.dialects import InMemory
from loratools.dialects._frame.items import items_in
from loratools.parallel import Progress, no_progress
from loratools.reports.numbers import names_of
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, is_reference
from loratools.surgery.inputs import open_model
from loratools.surgery.inspect import inspect

Source = Location | Adapter | InMemory | Checkpoint
"""What a report takes: a path, a reference, or an opened value."""


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """An adapter by the name that the page has for it."""

    name: str
    adapter: Adapter


@dataclass(frozen=True, slots=True, eq=False)
class NamedModel:
    """A model by the name that the page has for it."""

    name: str
    model: Checkpoint


@dataclass(frozen=True, slots=True)
class NamedFolder:
    """A folder that holds no adapter itself, and several below it."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """All inputs of one page. `base` is the model that `--base` names; `seed` draws what is random on the page.

    `progress` is told of the bytes of models that are read for it.
    """

    adapters: tuple[Named, ...] = ()
    models: tuple[NamedModel, ...] = ()
    folders: tuple[NamedFolder, ...] = ()
    base: NamedModel | None = None
    seed: int = 0
    progress: Progress = no_progress


def opened(
    inputs: Sequence[Source], base: Location | Checkpoint | None, seed: int, progress: Progress = no_progress
) -> Subjects:
    """Open the inputs of a page; raise what opening raises."""
    names = names_of([_place(source, i) for i, source in enumerate(inputs, 1)])
    model = None if base is None else NamedModel(names_of([_place(base, 0)])[0], open_model(base))
    adapters: list[Named] = []
    models: list[NamedModel] = []
    folders: list[NamedFolder] = []
    for name, source in zip(names, inputs, strict=True):
        if folder := _folder(source):
            folders.append(NamedFolder(name, folder))
            continue
        value = _opened(source, model.model if model else None)
        if isinstance(value, Checkpoint):
            models.append(NamedModel(name, value))
        else:
            adapters.append(Named(name, value))
    return Subjects(tuple(adapters), tuple(models), tuple(folders), model, seed, progress)


def _folder(source: Source) -> Path | None:
    """Return the path of a folder with several adapters or models below it and none in itself; None for all else."""
    if not isinstance(source, str | os.PathLike) or is_reference(source) or not Path(source).is_dir():
        return None
    path = Path(source)
    items = items_in(path).paths
    return path if len(items) > 1 and path not in items else None


def _opened(source: Source, base: Checkpoint | None) -> Adapter | Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | os.PathLike) and inspect(source).type == "checkpoint":
        return open_model(source)
    return dialects.open_adapter(source, base=base)


def _place(source: Source, number: int) -> str:
    if isinstance(source, Checkpoint):
        return str(source.path)
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"adapter {number}"
