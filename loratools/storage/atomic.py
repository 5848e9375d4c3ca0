"""A file or a folder appears under its final name whole, or not at all.

Work happens in a scratch folder `.NAME.partial-XXXXXXXX` beside the output, locked (flock) by the process that writes
it; at the end it is renamed. The kernel drops the lock when the process dies, however it dies, so the next run for the
same output can tell what is abandoned from what another process is writing. Process numbers could not tell: they are
used again, and mean nothing in another container or on another machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import BadFile, LoraToolsError, NoSpace, OutputRefused

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_folder(target: Path, *, force: bool = False, key: str | None = None) -> Iterator[Path]:
    """Yield an empty scratch folder beside `target` that becomes `target` when the block succeeds.

    Any exception, an interrupt included, removes the scratch folder and leaves `target` as it was. A killed process
    leaves only its scratch folder, which the next run for the same target removes.

    With a `key` (at least eight hex digits) the scratch folder outlives an interruption and a full disk: the next run
    with the same key finds it as it was, a run without removes it. A `LoraToolsError` removes it at once, for the next
    run would meet the same error.

    Raises `OutputRefused` if `target` exists and `force` is not set, or is a file, or another process is writing into
    the folder of that key; `NoSpace` when the disk is full.
    """
    with _scratch(target, force, f"resume-{key[:8]}" if key else None) as scratch:
        _check_kind(target, folder=True)
        yield scratch
        _install(scratch, target.absolute(), force, scratch.name.rpartition("-")[2])


@contextmanager
def new_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of a scratch file that becomes `target` when the block succeeds; see `new_folder`."""
    with _scratch(target, force) as scratch:
        _check_kind(target, folder=False)
        path = scratch / target.name
        yield path
        check_output(target, force=force)
        path.replace(target.absolute())
        remove(scratch)


@contextmanager
def new_output(target: Path, name: str, *, force: bool = False) -> Iterator[Path]:
    """Yield where to write a file: `target` itself, if it has the suffix of `name`, or `name` in a folder `target`."""
    single = target.suffix == Path(name).suffix
    with (new_file if single else new_folder)(target, force=force) as scratch:
        yield scratch if single else scratch / name


def free_space(target: Path) -> int:
    """Return the bytes that are free on the disk of an output."""
    return shutil.disk_usage(target.absolute().parent).free


def check_space(target: Path, size: int) -> None:
    """Raise `NoSpace` where an output of `size` bytes does not fit on its disk."""
    if size > (free := free_space(target)):
        raise NoSpace(f"{target}: the result takes {size} bytes, the disk has {free} free; nothing was written")


def check_output(target: Path, *, force: bool = False) -> None:
    """Refuse an output that exists (`OutputRefused`), or whose parent folder is missing (`BadFile`).

    With `force` an existing output is accepted, unless it is a symbolic link, or a folder that holds the current folder
    or the home folder: a slip like `-o . --force` must not delete those.
    """
    if target.is_symlink() or target.exists():
        if not force:
            raise OutputRefused(f"{target} exists already", hint="Choose another output, or replace it with --force.")
        if target.is_symlink():
            raise OutputRefused(f"{target} is a symbolic link; loratools does not write through links")
        resolved = target.resolve()
        for name, find in (("current", Path.cwd), ("home", Path.home)):
            with suppress(OSError, RuntimeError):  # there may be no such folder
                if (place := find().resolve()) == resolved or resolved in place.parents:
                    raise OutputRefused(f"{target} is or holds the {name} folder; it will not be replaced")
    if not target.absolute().parent.is_dir():
        raise BadFile(f"{target.absolute().parent}: no such folder to write {target.name} into")


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


@contextmanager
def _scratch(target: Path, force: bool, kept: str | None = None) -> Iterator[Path]:
    absolute = target.absolute()
    scratch = absolute.parent / (f".{absolute.name}.{kept or f'partial-{secrets.token_hex(4)}'}")
    _sweep(absolute, scratch)
    check_output(target, force=force)
    lock = None
    try:
        scratch.mkdir(exist_ok=kept is not None)
        lock = _lock(scratch)
        if kept and lock is None:
            raise _Busy(f"{target} is being written by another process", hint="Wait for it, or choose another output.")
        yield scratch
    except BaseException as error:
        if not isinstance(error, _Busy) and (kept is None or isinstance(error, LoraToolsError)):
            remove(scratch)
        if isinstance(error, OSError) and error.errno in _FULL:
            reason = os.strerror(error.errno or 0).lower()
            hint = "Free some space and run it again."
            raise NoSpace(f"{target}: {reason}; nothing was written", hint=hint) from None
        raise
    finally:
        if lock is not None:
            os.close(lock)


class _Busy(OutputRefused):
    """Another process holds the scratch folder: it is not ours to remove."""


def _check_kind(target: Path, *, folder: bool) -> None:
    if target.exists() and target.is_dir() != folder:
        existing, wanted = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
        raise OutputRefused(f"{target} is {existing}; the output would be {wanted}", hint="Choose another output.")


def _install(scratch: Path, target: Path, force: bool, token: str) -> None:
    check_output(target, force=force)  # again: hours may have passed
    # A folder cannot be replaced in one step: move the old one aside, put the new one in, then drop the old.
    aside = None
    if target.is_dir():
        aside = target.with_name(f".{target.name}.replaced-{token}")
        target.rename(aside)
    try:
        scratch.replace(target)
    except BaseException:
        if aside is not None and not target.exists():
            aside.rename(target)
        raise
    if aside is not None:
        remove(aside)


def _sweep(target: Path, mine: Path) -> None:
    """Remove what killed runs for the same target left, except `mine` and what another process is writing.

    A run that was killed in the middle of a replacement had moved the old folder aside; put that folder back.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced|resume)-([0-9a-f]{8})")
    with suppress(OSError):
        leftovers = [match for path in target.parent.iterdir() if (match := pattern.fullmatch(path.name))]
        for match in sorted(leftovers, key=lambda match: match[1], reverse=True):  # the replaced ones first
            leftover = target.with_name(match[0])
            if leftover == mine:
                continue
            kind = "partial" if match[1] == "replaced" else match[1]
            owner = target.with_name(f".{target.name}.{kind}-{match[2]}")
            lock = _lock(owner)
            if lock is None and owner.exists():
                continue
            try:
                if match[1] == "replaced" and not target.exists():
                    leftover.rename(target)
                else:
                    remove(leftover)
            finally:
                if lock is not None:
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder while the returned descriptor is open; return None where another process holds the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or a file system without locks, where nothing is ever swept
        os.close(descriptor)
        return None
    return descriptor


def refuse_inputs(output: Path, inputs: Sequence[str | Path | None]) -> None:
    """Refuse an output that is an input, lies in one, or holds one."""
    target = output.resolve()
    for path in inputs:
        source = Path(path).resolve() if path is not None else None
        if source and (target == source or source in target.parents or target in source.parents):
            raise OutputRefused(f"{output} is, holds or lies in the input {path}", hint="Choose another output.")
