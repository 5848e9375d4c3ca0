"""Show and change what an adapter's files say about it; no tensor is touched.

changing     facts, entries and what is private, changed in the documents
documents    header, manifest, adapter_config.json and README.md, as they are edited
pictures     thumbnails, without what they say of their making
privacy      what metadata say of people and machines
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from loratools import dialects
from loratools.decisions import decided, warned
from loratools.dialects._frame.facts import Facts, facts_of
from loratools.dialects._frame.listing import Listing
from loratools.dialects._frame.places import Fact, table_of
from loratools.errors import BadFile, InvalidOption, LoraToolsError, OutputRefused
from loratools.storage import atomic
from loratools.storage.beside import along, making
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.rewrite import How, NewHeader, editing, finish
from loratools.storage.rewrite.header import write_copy
from loratools.storage.sources import Location, as_path, is_reference, session
from loratools.surgery.edit.changing import Change, Wanted, changed
from loratools.surgery.edit.documents import Documents, place_of

_STATE = "state of a training run, which can hold paths, names and tokens"


@dataclass(frozen=True, slots=True)
class Edit:
    """What an adapter's files say, and what was changed.

    `facts` and `entries`, those of the header, are as they are after the changes. `files` maps the name of a file that
    was written to how: `replaced` by a new one, or the `header` alone; it is empty where nothing was.
    """

    path: str
    output: str | None
    dialect: str
    facts: Facts
    entries: Mapping[str, str]
    changes: tuple[Change, ...]
    files: Mapping[str, How]
    dry_run: bool = False


@session()
def edit(
    adapter: Location,
    output: Location | None = None,
    *,
    trigger: str | Sequence[str] | None = None,
    title: str | None = None,
    tags: str | Sequence[str] | None = None,
    base: str | None = None,
    description: str | None = None,
    author: str | None = None,
    license: str | None = None,
    thumbnail: Location | None = None,
    entries: Mapping[str, str] | None = None,
    unset: Sequence[str] = (),
    strip: bool = False,
    dialect: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Edit:
    """Show or change what an adapter's files say about it, in place or into a new file; no tensor is touched.

    A fact is written where the adapter's dialect keeps it (`loratools.dialects._frame.places`), and wherever else the
    files have it already: header, adapter_config.json and README.md stay in agreement. A sealed adapter stays sealed:
    neither its digest nor the meaning of its tensors covers what can be edited. In place a reader finds the old or the
    new, also after a kill; the header of a file of 64 MiB or more is written over the old one, all else anew. An empty
    text takes a fact out.

    Args:
        adapter: The file or folder; a reference such as `hf://org/name` needs an `output`. A model's safetensors file
            is taken too.
        output: The new file or folder; it must not exist, unless `force`. Default: the adapter is changed in place.
        trigger: Its trigger words: a text with commas, or several texts. Default: they stay; so with all that follow.
        title: Its name for people.
        tags: Words to find it by, as `trigger`.
        base: The base model's name, such as `"org/name"`.
        description: What it does.
        author: Who made it.
        license: The licence, best as its SPDX identifier.
        thumbnail: A picture: PNG, JPEG or WebP of at most 2 MB. What it says of its making (prompts, places) is left
            out.
        entries: Any entries of the header, name -> value.
        unset: Names of header entries to take out, or globs such as `"ss_*"`. What decides the result stays.
        strip: Whether to take out what is private: local paths, names of people, machines and dataset folders, prompts,
            captions, comments, mail addresses, session ids. State of a training run (training_args.bin,
            checkpoint-100/) is not taken along into an output. Default: no.
        dialect: The dialect to read it as (`loratools.list_dialects()`). Default: by its contents.
        force: Whether to replace an output that exists. Default: no.
        dry_run: Whether to write nothing and return what would be changed. Default: no.

    Returns:
        An `Edit`: the facts, and every change.

    Raises:
        InvalidOption: An option cannot be, or is one that this dialect has no place for; all of them are named.
        BadFile, InvalidFormat, UnsupportedAdapter: The adapter cannot be read.
        OutputRefused: The output exists, or the adapter is write-protected, a link, or being edited.

    Example:
        >>> edit("lora.safetensors").facts.trigger  # doctest: +SKIP
        ('sks dog',)
        >>> edit("lora.safetensors", trigger="sks dog", strip=True).changes[0].key  # doctest: +SKIP
        'modelspec.trigger_phrase'
    """
    facts: dict[Fact, str | None] = {
        "trigger": _joined(trigger), "title": title, "tags": _joined(tags), "base": base, "description": description,
        "author": author, "license": license, "thumbnail": None if thumbnail is None else fspath(thumbnail),
    }  # fmt: skip
    facts = {fact: value for fact, value in facts.items() if value is not None}
    wanted = Wanted({k: v for k, v in facts.items() if v is not None}, dict(entries or {}), tuple(unset), strip)
    target = Path(output) if output is not None else None
    if target is not None:
        atomic.sweep(target)
    in_place = target is None and not dry_run and wanted.anything
    if in_place and is_reference(adapter):
        if str(adapter).startswith("hf://"):
            hint = "Write the edited one to a folder with -o, and push that."
            raise InvalidOption(f"{adapter} lies on the Hub", hint=hint)
        raise InvalidOption(f"{adapter} lies in a store", hint="Write the edited one elsewhere with -o.")
    if not is_reference(adapter):
        _recover(as_path(adapter))
    listing, name, documents = _open(adapter, dialect)
    if not in_place:
        left = _of_training(listing) if strip and target is not None else ()
        changes = (*changed(documents, name, wanted), *left)
        if target is not None and not dry_run:
            _write_new(listing, documents, target, force, {change.where for change in left})
        return _edit(adapter, target, name, documents, changes, {}, dry_run)
    with editing(place_of(documents)) as holding:
        changes = changed(documents, name, wanted)
        files = documents.changes()
        how = holding.commit(files) if files else {}
    if strip and (beside := [change.where for change in _of_training(listing)]):
        warned(
            "%s: %s: %s, stays here; with an output, and by push, it is left out", adapter, ", ".join(beside), _STATE
        )
    return _edit(adapter, None, name, documents, changes, how, False)


def _joined(value: str | Sequence[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else ", ".join(value)


def _recover(path: Path) -> None:
    """Bring to its end what a killed run had begun to do to these files."""
    for place in [path] if not path.is_dir() else [file for file in path.iterdir() if not file.name.startswith(".")]:
        finish(place)


def _open(path: Location, dialect: str | None) -> tuple[Listing, str, Documents]:
    """Return what lies there, the name of its dialect, "model" for a model's file, and what its files say."""
    listing = Listing.of(path)
    if dialect is None and listing.single and not dialects.is_adapter(listing):
        Checkpoint.open(listing.path)  # which says what is wrong with a file that is neither
        return listing, "model", Documents.of(listing, None)
    listing = dialects.located(listing, dialect)
    name = dialect or dialects.detect(listing)[0]
    try:
        adapter = dialects.get(name).read(listing)
    except LoraToolsError as error:  # which merges and converts alone need to know
        if not listing.single:
            raise
        decided(
            "%s: not read as an adapter, and its header can be edited all the same: %s", listing.path, error.message
        )
        return listing, name, Documents.of(listing, None)
    return listing, name, Documents.of(listing, adapter)


def _edit(
    path: Location, output: Path | None, dialect: str, documents: Documents, changes: tuple[Change, ...],
    how: Mapping[str, How], dry_run: bool,
) -> Edit:  # fmt: skip
    base = next((documents.get(place) for place in table_of(dialect).get("base", ()) if documents.has(place)), None)
    facts = facts_of(documents.entries or {}, base, documents.card)
    return Edit(
        str(path), str(output) if output else None, dialect, facts, dict(documents.entries or {}), changes, how, dry_run
    )


def _of_training(listing: Listing) -> tuple[Change, ...]:
    """Return what a training run left beside an adapter, as what `strip` takes out."""
    if listing.single:
        return ()
    found = [path for path in _files_in(listing.folder) if along.is_training(path.relative_to(listing.folder))]
    return tuple(
        Change(path.relative_to(listing.folder).as_posix(), "file", f"{path.stat().st_size} bytes", None, _STATE)
        for path in found
    )


def _files_in(folder: Path) -> list[Path]:
    """Return the files below a folder but those that are hidden, in the order of their names."""
    every = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in every if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _write_new(listing: Listing, documents: Documents, target: Path, force: bool, left: AbstractSet[str]) -> None:
    """Write the edited file or folder anew; what is not edited is copied, but for the files that are left out."""
    atomic.refuse_inputs(target, [listing.path])
    files = documents.changes(making.entry())
    if listing.single:
        if target.suffix != listing.path.suffix:
            raise OutputRefused(
                f"{target}: {listing.path} is one file, and so is the output; name it *{listing.path.suffix}"
            )
        with atomic.new_file(target, force=force) as path:
            _put(listing.path, files.get(listing.path.name), path)
        return
    if target.suffix in (".safetensors", ".bin"):
        raise OutputRefused(f"{target}: {listing.path} is a folder, and so is the output")
    with atomic.new_folder(target, force=force) as folder:
        for source in _files_in(listing.folder):
            name = source.relative_to(listing.folder)
            if name.as_posix() in left:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _put(source, files.get(str(name)), folder / name)


def _put(source: Path, content: bytes | NewHeader | None, target: Path) -> None:
    if isinstance(content, NewHeader):
        write_copy(source, content, target)
    elif content is not None:
        target.write_bytes(content)
    else:
        shutil.copyfile(source, target)
    if not target.is_file():
        raise BadFile(f"{target}: was not written")
