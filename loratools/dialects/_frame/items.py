"""The adapters and models in a folder and in all folders below it, by their names: what `--each FOLDER` means.

A folder is one item where its files belong together: an adapter with its adapter_config.json, shards with their index,
a model with its config.json, a pipeline. Elsewhere each file of tensors is an item. Nothing is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter.naming.compact import natural
from loratools.errors import BadFile
from loratools.options import near
from loratools.storage.beside.along import is_index, is_of_training
from loratools.storage.pickles import SUFFIXES as PICKLES
from loratools.storage.sources import is_reference

_LONE = (".safetensors", ".gguf", ".npz", ".nemo", *PICKLES)
"""Endings of files that are an item of their own, where nothing in their folder belongs to them."""

_ADAPTER, _MODEL, _PIPELINE, _MODULES = "adapter_config.json", "config.json", "model_index.json", "modules.json"
_SHARD = re.compile(r".+-\d{5,}-of-\d{5,}\.(safetensors|bin)|.+\.distcp")
_LATER_PART = re.compile(r".+-(?!0*1-)\d{5,}-of-\d{5,}\.gguf")
_MODULE = re.compile(r"\d+_\w+")  # a folder of a sentence-transformer: 1_Pooling, 2_Dense
# What is hidden; caches; DeepSpeed's shares of the optimizer; a run's log; formats that are folders.
_NOT_ENTERED = re.compile(r"\..*|__pycache__|global_step\d+|wandb|.*\.(mlpackage|mlmodelc|zarr)")


@dataclass(frozen=True, slots=True)
class Items:
    """What a folder holds: paths of adapters and models, and the folders that cannot be listed, with the reason."""

    paths: tuple[Path, ...]
    unread: tuple[tuple[Path, str], ...] = ()


def items_in(folder: str | os.PathLike[str], skip: Collection[str | os.PathLike[str]] = ()) -> Items:
    """List the adapters and models in a folder and below it, in natural order: a folder before what is in it.

    Hidden files and folders are left out, and so are a trainer's own files. A link to a file stands for that file; a
    link to a folder is followed where it leads out of `folder`. What can be reached twice is listed once, by its own
    name rather than by that of a link.

    Args:
        folder: The folder.
        skip: Folders that are not entered, such as one that is written to. Default: none.

    Raises:
        BadFile: There is no such folder, or it is a file.

    Example:
        >>> items_in("loras").paths  # doctest: +SKIP
        (PosixPath('loras/style.safetensors'), PosixPath('loras/tuned/checkpoint-500'))
    """
    if is_reference(os.fspath(folder)):
        hint = "Fetch it with `loratools pull` first, or give it itself to a command that takes one."
        raise BadFile(f"{folder}: a reference is no folder", hint=hint)
    top = Path(folder)
    if not top.is_dir():
        if not top.exists():
            raise BadFile(f"{folder}: no such folder", hint=_instead(top))
        hint = f"Give the folder in which it lies, {top.parent}, or the file itself to a command that takes one."
        raise BadFile(f"{folder}: this is a file, and a folder is expected", hint=hint)
    walk = _Walk(os.path.realpath(top), [Path(path).stat() for path in skip if Path(path).exists()])
    listed = list(walk.items(str(top)))
    own: dict[str, str] = {}
    for path, _ in sorted(listed, key=lambda item: item[1]):  # which is stable: what is no link comes first
        own.setdefault(os.path.realpath(path) if walk.links else path, path)
    kept = set(own.values())
    return Items(tuple(Path(path) for path, _ in listed if path in kept), tuple(walk.unread))


def _instead(folder: Path) -> str:
    """Return what to give where a folder is not there, with the one beside it of nearly its name."""
    beside = folder.absolute().parent
    named = near(folder.name, [each.name for each in beside.iterdir() if each.is_dir()]) if beside.is_dir() else ""
    return f"Give the folder in which the adapters or models lie{named or '.'}"


class _Walk:
    """One walk through a folder, whose real path is `top`; `unread` are the folders in it that cannot be listed."""

    def __init__(self, top: str, skip: Sequence[os.stat_result]) -> None:
        self.links = False
        self.unread: list[tuple[Path, str]] = []
        self._top, self._skip, self._entered = top, skip, set[str]()

    def items(self, top: str) -> Iterator[tuple[str, bool]]:
        """Yield each item's path, and whether it was reached through a link."""
        left = [(top, False)]
        while left:
            folder, linked = left.pop()
            try:
                with os.scandir(folder) as entries:
                    inside = sorted((each for each in entries if each.name[:1] != "."), key=lambda e: natural(e.name))
            except OSError as error:
                self.unread.append((Path(folder), (error.strerror or str(error)).lower()))
                continue
            folders = {entry: None for entry in inside if _is_folder(entry)}  # looked up once for each entry
            names = [entry.name for entry in inside if entry not in folders]
            whole = _is_one(names)
            if whole:
                yield folder, linked
            lone = () if whole else frozenset(_lone(names))
            for entry in inside:
                if entry.name in lone:
                    self.links |= entry.is_symlink()
                    yield entry.path, linked or entry.is_symlink()
            below = [entry for entry in folders if _may_hold(entry.name, names) and self._enters(entry)]
            left += [(entry.path, linked or entry.is_symlink()) for entry in reversed(below)]

    def _enters(self, entry: os.DirEntry[str]) -> bool:
        """Tell whether a folder is entered: a link is where it leads out of the tree, to where none has led before."""
        if self._skip and any(os.path.samestat(Path(entry.path).stat(), skipped) for skipped in self._skip):
            return False
        if not entry.is_symlink():
            return True
        self.links, real = True, os.path.realpath(entry.path)
        apart = not Path(real).is_relative_to(self._top) and not Path(self._top).is_relative_to(real)
        new = apart and real not in self._entered
        self._entered.add(real)
        return new


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not look: opening it says so
        return False


def _may_hold(folder: str, names: Collection[str]) -> bool:
    """Tell whether a folder may hold items, by its name and those of the files beside it."""
    part = _PIPELINE in names or (_MODULES in names and _MODULE.fullmatch(folder))
    return not part and not _NOT_ENTERED.fullmatch(folder)


def _is_one(names: Sequence[str]) -> bool:
    """Tell whether the files of a folder are one adapter or model together."""
    if _ADAPTER in names or _PIPELINE in names or any(is_index(name) or _SHARD.fullmatch(name) for name in names):
        return True
    return _MODEL in names and any(name.endswith((".safetensors", ".bin")) for name in _lone(names))


def _lone(names: Sequence[str]) -> list[str]:
    return [n for n in names if n.endswith(_LONE) and not is_of_training(n) and not _LATER_PART.fullmatch(n)]
