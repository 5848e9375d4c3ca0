"""Symbolic links in folders of strangers: followed inside the folder and the Hub's cache that holds it, nowhere else.

A link is a file name that somebody else chose. What it leads to would be hashed, copied into a model, or sent to the
Hub under an innocent name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from loratools.errors import BadFile, counted


def refuse_outside(paths: Iterable[Path], root: Path) -> None:
    """Raise `BadFile` with every path that leads out of `root`, a folder, by a link in it or in a folder below it.

    A snapshot in the cache of huggingface_hub consists of links to `blobs` beside it, and those are its own.
    """
    paths = [
        path for path in paths if path.parent != root or path.name == ".." or path.is_symlink()
    ]  # a file in it is in it
    if not paths:
        return
    own = root.resolve()
    allowed = [own]
    for parent in (own, *own.parents):
        if parent.parent.name == "snapshots":
            allowed.append(parent.parent.parent / "blobs")
    outside = [
        f"{path}: leads to {target}"
        for path in paths
        if not any((target := _target(path)).is_relative_to(place) for place in allowed)
    ]
    if outside:
        raise BadFile(
            f"{root}: {counted(len(outside), 'link in it leads', 'links in it lead')} "
            "out of it; links are followed only inside a folder, or inside "
            "the Hub's cache that holds it",
            outside,
            hint="Put the file itself there, or give the folder that it is in.",
        )


def _target(path: Path) -> Path:
    """Return where a path leads; the file system's root, which no folder holds, for links in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError up to Python 3.12
        return Path(path.anchor or "/")


def walk(root: Path) -> Iterator[Path]:
    """Yield every file in a folder and below it, hidden ones aside; linked folders are not entered.

    Raises `BadFile` for a linked folder that leads out of it.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        refuse_outside((Path(folder) / name for name in subfolders), root)
        visible = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
        yield from (path for path in visible if path.is_file())
