"""What a command line with several paths, or with `--each FOLDER`, is about: the inputs, and where each result goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from loratools.errors import BadFile, OutputRefused, counted

OUTPUT = "output"
"""The option that says where a result goes, of the commands that have one."""

Renamed = Callable[[str, bool, Mapping[str, Any]], str]
"""Makes the name of an output: of the input's relative path, whether it is a file, and the values of the options."""


@dataclass(frozen=True, slots=True)
class Item:
    """One input as the user would call it, and where its result goes; None where nothing is written.

    `listed` tells that a folder of --each has it: nobody named it, so a command passes over what it does not take.
    """

    path: str
    output: Path | None = None
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one command line in order, how many are worked on at once, and the folders that cannot be listed.

    `workers` says who works on them, if not this process and its like.

    `after` has the numbers of the items that come before one, because its result goes into the folder of theirs.
    """

    items: tuple[Item, ...]
    jobs: int
    workers: str | None = None
    unread: tuple[tuple[Path, str], ...] = ()
    after: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def folders(self) -> list[Path]:
        """Return the folders around all outputs, the innermost first."""
        around = {parent for item in self.items if item.output for parent in item.output.parents}
        return sorted(around, key=lambda folder: -len(folder.parts))


def batch_of(context: click.Context, argument: str, renamed: Renamed | None) -> Batch:
    """Return what a command line with several paths is about.

    Takes --each, --jobs and --workers away from the context's options. `renamed` makes the names of outputs. Default:
    the inputs'.

    Raises:
        BadFile: A folder is not there, or there is nothing in it.
        OutputRefused: Two results would go to one place, or one to where its input is.
    """
    params = context.params
    paths, folders = params.pop(argument), params.pop("each")
    jobs: int | None = params.pop("jobs")
    workers: str | None = params.pop("workers")
    if workers and jobs:
        raise click.UsageError("--workers says who works, and how many at once: without --jobs", context)
    if not paths and not folders:
        missing = next(each for each in context.command.params if each.name == argument)
        raise click.MissingParameter(ctx=context, param=missing, param_hint=f"'{argument.upper()}'")
    output: Path | None = params.get(OUTPUT)
    if output is not None and output.is_dir():
        from loratools.dialects._frame.items import items_in

        if output in items_in(str(output)).paths:  # which is more than a folder that holds such
            raise OutputRefused(
                f"{output}: a model or an adapter itself; results beside its files would become files of it",
                hint="Choose another -o FOLDER.",
            )
    named = {path: _own_name(path) for path in paths}
    unread: list[tuple[Path, str]] = []
    for folder in folders:
        named |= _below(folder, output, unread)
    if output is None:
        items = [Item(path, listed=path not in paths) for path in named]
        return Batch(tuple(items), jobs or 1, workers, tuple(unread))
    if output.exists() and not output.is_dir():
        raise OutputRefused(f"{output}: a file; the results of several inputs go into a folder")
    items = []
    for path, name in named.items():
        name = renamed(name, Path(path).is_file(), params) if renamed else name
        items.append(Item(path, output / name, listed=path not in paths))
    _check(items)
    return Batch(tuple(items), jobs or 1, workers, tuple(unread), _after(items))


def named_for(name: str, dialect: str) -> str:
    """Return what a file is called in a dialect: with an ending of its files, or without, for a folder.

    >>> named_for("styles/line.pt", "loratools"), named_for("line.safetensors", "peft")
    ('styles/line.safetensors', 'line')
    """
    from loratools.dialects import get

    path, endings = Path(name), get(dialect).FILES
    return name if path.suffix in endings else str(path.with_suffix(endings[0] if endings else ""))


def _own_name(path: str) -> str:
    """Return what a path is called: its last part; a reference by its file, or by its repository without the owner."""
    if "://" in path:
        parts = path.partition("://")[2].split("/")
        return parts[-1] if Path(parts[-1]).suffix == ".safetensors" else parts[1 % len(parts)].partition("@")[0]
    return Path(path).name if Path(path).name not in ("", "..") else Path(path).resolve().name


def _below(folder: str, output: Path | None, unread: list[tuple[Path, str]]) -> dict[str, str]:
    """Return the paths of the items in a folder, and what each is called in it."""
    from loratools.dialects._frame.items import items_in

    found = items_in(folder, skip=[output] if output else [])
    unread += found.unread
    if not found.paths and not found.unread:
        raise BadFile(f"{folder}: no adapter or model in this folder")
    return {str(path): path.relative_to(folder).as_posix() for path in found.paths}


def _check(items: Iterable[Item]) -> None:
    """Raise `OutputRefused` with every place that two results, or a result and its input, would share."""
    places: dict[str, list[str]] = {}
    problems = []
    for item in items:
        place = os.path.realpath(item.output or "")
        if place == os.path.realpath(item.path):
            problems.append(f"{item.path}: its result would take its place")
        places.setdefault(os.path.normcase(place), []).append(item.path)
    shared = [paths for paths in places.values() if len(paths) > 1]
    problems += [f"{' and '.join(paths)}: both would be {place}" for place, paths in places.items() if paths in shared]
    if problems:
        raise OutputRefused(
            f"{counted(len(problems), 'output')} cannot be; nothing was written",
            problems,
            hint="Choose another -o FOLDER; --each FOLDER keeps the folders of the inputs apart.",
        )


def _after(items: Sequence[Item]) -> dict[int, list[int]]:
    """Return the items whose results are folders around another's, by the number of that."""
    numbers = {item.output: number for number, item in enumerate(items)}
    around = {
        number: [numbers[parent] for parent in item.output.parents if parent in numbers]
        for number, item in enumerate(items)
        if item.output
    }
    return {number: before for number, before in around.items() if before}
