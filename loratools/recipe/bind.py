"""The inputs of a recipe: where it says, where the caller says, or found by their digest in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.decisions import decided, warned
from loratools.dialects import Listing
from loratools.errors import BadFile, InvalidOption, LoraToolsError, counted
from loratools.recipe import identity
from loratools.recipe.catalog import Role, nearest
from loratools.recipe.value import Recipe, Source
from loratools.storage.sources import absent, is_reference, local

MAX_FOLDERS = 20_000
"""Folders that a search looks into."""


@dataclass(frozen=True, slots=True)
class Bound:
    """An input at hand: what commands are given for it, and where it lies."""

    text: str
    path: Path | None


def bind(
    recipe: Recipe, inputs: Mapping[str, str], search: Path | None = None, *, fetch: bool = True
) -> dict[str, Bound]:
    """Return where each input of a recipe is, by its name: `inputs` wins, then what the recipe says, then `search`.

    An input with a digest is one whose tensors have it. Without `fetch` a reference to the Hub is taken as it is.

    Raises `InvalidOption` for names that the recipe has not, and `BadFile` for every input that is nowhere, or is
    another one than the recipe names.
    """
    if unknown := [name for name in inputs if name not in recipe.sources]:
        raise InvalidOption(
            f"{recipe.path}: {'; '.join(f'no input {name!r}{nearest(name, recipe.sources)}' for name in unknown)}",
            hint=f"Its inputs are {', '.join(recipe.sources) or 'none'}.",
        )
    bound: dict[str, Bound] = {}
    problems: list[str] = []
    wanted: list[tuple[Source, Role]] = []
    for source, kind in recipe.needed():
        role: Role = "model" if kind == "model" else "adapter"
        try:
            at = _at(source, inputs.get(source.name), recipe.path.parent, fetch)
            if at is None:
                wanted.append((source, role))
                continue
            if at.path is not None:
                _check(source, role, at.path)
            bound[source.name] = at
        except LoraToolsError as error:
            problems.append(f"{source.name}: {error.line}")
    if search is not None and wanted:
        found = _search(search, wanted)
        bound |= {name: Bound(str(path), path) for name, path in found.items()}
        wanted = [(source, role) for source, role in wanted if source.name not in found]
    problems += [f"{source.name}: {_missing(source, search)}" for source, _ in wanted]
    if problems:
        raise BadFile(
            f"{recipe.path}: {counted(len(problems), 'input is', 'inputs are')} not at hand", problems,
            hint="Say where they are with --input NAME=PATH, or have them found by digest with --search FOLDER.",
        )  # fmt: skip
    return bound


def _at(source: Source, told: str | None, folder: Path, fetch: bool) -> Bound | None:
    """Return where an input is said to be; None where that is nowhere, or there is nothing at that place."""
    if told is not None:
        if is_reference(told):
            return Bound(told, local(told) if fetch else None)
        if not Path(told).exists():
            raise absent(told)
        return Bound(told, Path(told))
    if source.location is None:
        return None
    if is_reference(source.location):
        return Bound(source.location, local(source.location) if fetch else None)
    path = folder / source.location
    return Bound(str(path), path) if path.exists() else None


def _missing(source: Source, search: Path | None) -> str:
    named = source.digest or source.schema
    where = f"{source.location} is not there" if source.location else "the recipe does not say where it is"
    if search is None:
        return where
    return f"{where}, and nothing in {search} has {'the digest ' + named if named else 'a digest that it names'}"


def _check(source: Source, role: Role, path: Path) -> None:
    """Raise `BadFile` unless what lies at a path is the input that the recipe names by digest; warn of other files."""
    if source.schema is not None:
        there = identity.schema_of(path)
        if there != source.schema:
            raise BadFile(f"{path} has other tensors: the recipe names the schema {source.schema}, found {there}")
    if source.digest is not None:
        found = identity.tensors_of(path, role) or identity.content_of(path, role)
        if found != source.digest:
            raise BadFile(f"{path} is another {role}: the recipe names the digest {source.digest}, found {found}")
    if source.content is not None and identity.content_of(path, role) != source.content:
        warned("%s: its tensors are those of the recipe, and its header or files beside it are not: what is made of it "
               "may differ", path)  # fmt: skip


def _search(folder: Path, wanted: list[tuple[Source, Role]]) -> dict[str, Path]:
    """Return the place of each input that lies in a folder or below it, by digest: all of it, or else its tensors."""
    if not folder.is_dir():
        raise BadFile(f"{folder}: no such folder to search")
    found: dict[str, Path] = {}
    alike: dict[str, Path] = {}
    left = [(source, role) for source, role in wanted if source.digest or source.schema or source.content]
    for path in _candidates(folder):
        if not left:
            break
        for source, role in left:
            if _has_tensors(source, role, path):
                alike.setdefault(source.name, path)
                if source.content is None or identity.content_of(path, role) == source.content:
                    found[source.name] = path
                    decided("%s: found by its digest at %s", source.name, path)
        left = [(source, role) for source, role in left if source.name not in found]
    for source, role in left:
        if source.name in alike and source.digest:
            _check(source, role, alike[source.name])  # which warns
            found[source.name] = alike[source.name]
    return found


def _has_tensors(source: Source, role: Role, path: Path) -> bool:
    try:
        if role == "adapter":
            return source.digest in (identity.adapter_of(path), identity.content_of(path, role))
        if source.schema and identity.schema_of(path) != source.schema:
            return False
        if source.content and not source.digest and identity.content_of(path, role) != source.content:
            return False
        return not source.digest or identity.tensors_of(path, "model") == source.digest
    except LoraToolsError:
        return False


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield folders that hold weights, then their files of weights, the nearest first."""
    level = [folder]
    seen = 0
    while level:
        below: list[Path] = []
        for each in level:
            seen += 1
            if seen > MAX_FOLDERS:
                warned("%s: only the first %d folders were searched", folder, MAX_FOLDERS)
                return
            try:
                weights = Listing.of(each).weights
                below += sorted(
                    path for path in each.iterdir()
                    if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
                )  # fmt: skip
            except (LoraToolsError, OSError):
                continue
            if weights:
                yield each
                yield from (each / name for name in weights)
        level = below
