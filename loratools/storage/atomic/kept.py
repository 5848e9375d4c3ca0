"""Folders beside an output that outlive a run: what was fetched for it, and what its parts have finished."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loratools.errors import LoraToolsError, NoSpace
from loratools.storage.atomic import leftovers, locks
from loratools.storage.atomic.afar import refuse_afar
from loratools.storage.atomic.hidden import FULL, beside, make


@contextmanager
def kept_folder(target: Path, key: str) -> Iterator[Path]:
    """Yield the hidden folder `.NAME.pull-KEY` beside an output, for what is fetched for it; another block removes it.

    It stays when the block fails or the process is killed, and the next run with the same key (8 to 16 hex digits)
    finds it; a run for the same output with another key, or by another command that gets as far as writing, removes
    it. Raises `OutputRefused` while another process works in it.
    """
    refuse_afar(target, "what is fetched from the Hub")
    absolute = target.absolute()
    folder = beside(absolute, f"pull-{key}")
    leftovers.sweep(absolute, ("pull",), folder)
    lock = None
    try:
        lock = make(folder, target, kept=True)
        yield folder
    finally:
        if lock:
            lock.release()


@contextmanager
def part_folder(target: Path, key: str) -> Iterator[Path]:
    """Yield the hidden folder `.NAME.part-KEY` beside an output, for what one part of several makes of it.

    It stays when the block ends or is interrupted: `part_folders` finds it, and the run that makes the output of all
    parts, or another output in its place, removes it. A `LoraToolsError` removes it at once, for the next run would
    meet the same error. Raises `OutputRefused` while another process works in it.
    """
    refuse_afar(target, "work that is shared out")
    leftovers.sweep(target.absolute(), leftovers.GARBAGE)
    folder = beside(target.absolute(), f"part-{key}")
    lock = None
    try:
        lock = make(folder, target, kept=True)
        try:
            yield folder
        except LoraToolsError:
            leftovers.remove(folder)
            raise
    except OSError as error:
        if error.errno in FULL:
            reason = os.strerror(error.errno or 0).lower()
            hint = "Free some space there; the same call goes on from what is complete."
            raise NoSpace(f"{folder}: {reason}; this part is not complete", hint=hint) from None
        raise
    finally:
        if lock:
            lock.release()


@contextmanager
def part_room(folder: Path, target: Path) -> Iterator[None]:
    """Have the folder in which all parts of an output write there, and left alone, while the block runs.

    Other parts write in it too. It stays. Raises `OutputRefused` while a run makes the output of all parts.
    """
    lock = make(folder, target, kept=True, shared=True)
    try:
        yield
    finally:
        if lock:
            lock.release()


@contextmanager
def part_folders(target: Path, only: Sequence[Path] | None = None) -> Iterator[list[Path]]:
    """Yield the folders of all parts of an output, by name, which nobody else may work in or remove meanwhile.

    With `only` those of them that are in it. Raises `OutputRefused` where another process works in one.
    """
    refuse_afar(target, "work that is shared out")
    target = target.absolute()
    held: list[locks.Lock] = []
    try:
        folders = [folder for folder in leftovers.parts_of(target) if only is None or folder in only]
        for folder in folders:
            if lock := make(folder, target, kept=True):
                held.append(lock)
        yield folders
    finally:
        for lock in held:
            lock.release()
