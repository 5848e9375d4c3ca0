"""A file or a folder appears under its final name whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import BadFile, NoSpace, OutputRefused

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder beside `target` that becomes `target` when the block succeeds.

    Any exception, an interrupt included, removes the scratch folder and leaves `target` as it was. A killed process
    leaves only a folder `.NAME.partial-PID`, which the next run for the same target removes.

    Raises `OutputRefused` if `target` exists and `force` is not set, `NoSpace` when the disk is full.
    """
    with _scratch(target, force) as scratch:
        scratch.mkdir()
        yield scratch


@contextmanager
def new_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of a scratch file that becomes `target` when the block succeeds; see `new_folder`."""
    with _scratch(target, force) as scratch:
        yield scratch


def check_output(target: Path, *, force: bool = False) -> None:
    """Refuse an output that exists (`OutputRefused`), or whose parent folder is missing (`BadFile`)."""
    if target.is_symlink() or target.exists():
        if not force:
            raise OutputRefused(f"{target} exists already", hint="Choose another output, or replace it with --force.")
        if target.is_symlink():
            raise OutputRefused(f"{target} is a symbolic link; loratools does not write through links")
    if not target.absolute().parent.is_dir():
        raise BadFile(f"{target.absolute().parent}: no such folder to write {target.name} into")


@contextmanager
def _scratch(target: Path, force: bool) -> Iterator[Path]:
    target = target.absolute()
    check_output(target, force=force)
    _sweep(target)
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield scratch
        _install(scratch, target)
    except BaseException as error:
        remove(scratch)
        if isinstance(error, OSError) and error.errno in _FULL:
            reason = os.strerror(error.errno or 0).lower()
            raise NoSpace(
                f"{target}: {reason}; nothing was written", hint="Free some space and run it again."
            ) from None
        raise


def _install(scratch: Path, target: Path) -> None:
    # A folder cannot be replaced in one step: move the old one aside, put the new one in, then drop the old.
    aside = None
    if target.is_dir() and scratch.is_dir():
        aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        target.rename(aside)
    elif target.is_dir():
        raise OutputRefused(f"{target} is a folder; the output would be a file")
    try:
        scratch.replace(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    if aside is not None:
        remove(aside)


def _sweep(target: Path) -> None:
    """Remove what killed runs for the same target left behind; a scratch of a living process is not ours."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        owner = leftover.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) != os.getpid() and not _alive(int(owner)):
            remove(leftover)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
