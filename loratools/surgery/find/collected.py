"""All adapters below a folder, each opened once: what it is and the sketch of what it changes, in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter.model import BaseIdentity
from loratools.decisions import warned, warnings_to
from loratools.dialects._frame.items import items_in
from loratools.errors import LoraToolsError
from loratools.linalg.sketch import SIZE
from loratools.parallel import Progress, one_torch_thread
from loratools.storage.atomic.inputs import afresh
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, as_path, is_reference
from loratools.surgery.find.selection import Wanted
from loratools.surgery.find.sketches import Sketched, opened, sketched


@dataclass(frozen=True, slots=True)
class Failed:
    """What is an adapter by its names, and cannot be read: why not."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """The adapters below a folder with the path of each, what could not be read, and counts of the rest.

    `sketches` has a row for each adapter, float32 (n, 256), all zeros where `by_change` is not.
    `others` are models and files that are no adapters, `unselected` adapters of another base than was asked for.
    """

    adapters: list[Sketched]
    sketches: Tensor
    places: list[Path]
    failed: tuple[Failed, ...]
    others: int
    unselected: int


def collect(folder: str | Path, base: Location | Checkpoint | None, progress: Progress) -> Collected:
    """Open and sketch every adapter below a folder; warn of each that cannot be read.

    The parameters are those of `find`. Raises `BadFile` where there is no such folder.
    """
    wanted = None if base is None else Wanted.of(base)
    top = as_path(folder)
    items = items_in(folder if is_reference(folder) else top)
    if wanted is not None and wanted.name:
        wanted = wanted.known_from(_bases(items.paths))
    failed = [Failed(_name(path, top), reason) for path, reason in items.unread]
    others = unselected = 0
    adapters: list[Sketched] = []
    places: list[Path] = []
    # In one piece: each a tensor of its own, they would keep the pages from being used again on which they lie between
    # the factors of their adapters, twenty times as much.
    sketches = torch.zeros(len(items.paths), SIZE)
    for path in items.paths:
        name = _name(path, top)
        warnings: list[str] = []
        each = None
        try:
            with afresh(), one_torch_thread(), warnings_to(warnings.append):
                adapter = opened(path)
                chosen = adapter is not None and (wanted is None or wanted.has(adapter))
                if adapter is not None and chosen:
                    each, numbers = sketched(adapter, name, warnings)
                    if numbers is not None:
                        sketches[len(adapters)] = numbers
        except LoraToolsError as error:
            failed.append(Failed(name, "; ".join([error.message, *error.problems[:1]])))
        except ValueError as error:  # of a module's numbers: NaN or infinity
            failed.append(Failed(name, str(error)))
        else:
            others += adapter is None
            unselected += adapter is not None and not chosen
            if each is not None:
                adapters.append(each)
                places.append(path)
                progress(each.found.nbytes)
    for failure in failed:
        warned("%s: %s", failure.path, failure.reason)
    return Collected(adapters, sketches[: len(adapters)], places, tuple(failed), others, unselected)


def _bases(paths: Iterable[Path]) -> Iterator[BaseIdentity]:
    """Yield the bases that adapters state; what cannot be read is left out, and told where it is read again."""
    for path in paths:
        with warnings_to(lambda text: None), suppress(LoraToolsError, ValueError):
            adapter = opened(path)
            if adapter is not None and adapter.base is not None:
                yield adapter.base


def _name(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()
